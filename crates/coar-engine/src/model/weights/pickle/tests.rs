use super::*;

fn view(shape: &[i64], strides: &[i64], offset: i64) -> TensorRef {
    let storage = StorageRef {
        key: "0".into(),
        dtype: Dtype::U8,
        numel: 6,
    };
    TensorRef {
        storage: Rc::new(storage),
        offset,
        shape: shape.to_vec(),
        strides: strides.to_vec(),
    }
}

#[test]
fn strided_views_are_gathered_and_never_leave_the_storage() {
    let storage = [0u8, 1, 2, 3, 4, 5];
    assert_eq!(
        gather(&view(&[3, 2], &[1, 3], 0), &storage).unwrap(),
        [0, 3, 1, 4, 2, 5]
    );
    assert_eq!(gather(&view(&[], &[], 5), &storage).unwrap(), [5]);
    for (shape, strides, offset) in [
        (&[7i64][..], &[1i64][..], 0i64),
        (&[2], &[5], 1),
        (&[2], &[-1], 1),
        (&[1], &[1], 6),
        (&[i64::MAX, 4], &[1, 1], 0),
        (&[1 << 40], &[0], 0),
        (&[1], &[1], -1),
    ] {
        assert!(
            gather(&view(shape, strides, offset), &storage).is_err(),
            "{shape:?} {strides:?} {offset}"
        );
    }
}

/// A zip container around a pickle, with storages.
fn container(dir: &Path, pickle: &[u8], storages: &[(&str, &[u8])], deflate: bool) -> PathBuf {
    let file = dir.join("made.ckpt");
    let mut zip = zip::ZipWriter::new(File::create(&file).unwrap());
    let method = if deflate {
        zip::CompressionMethod::Deflated
    } else {
        zip::CompressionMethod::Stored
    };
    let options = zip::write::SimpleFileOptions::default().compression_method(method);
    let mut add = |name: String, bytes: &[u8]| {
        zip.start_file(name, options).unwrap();
        std::io::Write::write_all(&mut zip, bytes).unwrap();
    };
    add("made/data.pkl".to_owned(), pickle);
    for (key, bytes) in storages {
        add(format!("made/data/{key}"), bytes);
    }
    zip.finish().unwrap();
    file
}

fn text(value: &str) -> Vec<u8> {
    [&b"X"[..], &(value.len() as u32).to_le_bytes(), value.as_bytes()].concat()
}

fn int(value: i64) -> Vec<u8> {
    [&b"\x8a\x08"[..], &value.to_le_bytes()].concat()
}

/// `_rebuild_tensor_v2(storage, 0, (numel,), (1,), False, OrderedDict())`
fn tensor(class: &str, key: &str, numel: i64) -> Vec<u8> {
    let global = |name: &str| format!("c{}\n", name.replacen(' ', "\n", 1)).into_bytes();
    [
        global("torch._utils _rebuild_tensor_v2"),
        b"((".to_vec(),
        text("storage"),
        global(&format!("torch {class}")),
        text(key),
        text("cpu"),
        int(numel),
        b"tQK\x00".to_vec(),
        int(numel),
        b"\x85K\x01\x85\x89".to_vec(),
        global("collections OrderedDict"),
        b")RtR".to_vec(),
    ]
    .concat()
}

/// `{"state_dict": {name: value, ...}}`
fn state_dict(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut pickle = [&b"\x80\x02}"[..], &text("state_dict"), b"}("].concat();
    for (name, value) in entries {
        pickle.extend(text(name));
        pickle.extend(value);
    }
    pickle.extend(b"us.");
    pickle
}

/// The container from before PyTorch 1.6: each storage with its key, its declared number of elements, and its bytes.
fn legacy(dir: &Path, little_endian: bool, pickle: &[u8], storages: &[(&str, i64, &[u8])]) -> PathBuf {
    let order = if little_endian { b"\x88s." } else { b"\x89s." };
    let mut bytes = [
        &b"\x80\x02\x8a\x0a"[..],
        &LEGACY_MAGIC,
        b".\x80\x02M\xe9\x03.\x80\x02}",
        &text("little_endian"),
        order,
        pickle,
        b"\x80\x02](",
    ]
    .concat();
    storages.iter().for_each(|(key, ..)| bytes.extend(text(key)));
    bytes.extend(b"e.");
    for (_, count, data) in storages {
        bytes.extend(count.to_le_bytes());
        bytes.extend(*data);
    }
    let file = dir.join("legacy.ckpt");
    std::fs::write(&file, bytes).unwrap();
    file
}

fn problem(file: &Path) -> String {
    read(file, "state_dict")
        .expect_err("a broken checkpoint was read")
        .to_string()
}

#[test]
fn tensors_are_read_from_stored_and_deflated_entries() {
    let dir = tempfile::tempdir().unwrap();
    let pickle = state_dict(&[
        ("a", tensor("ByteStorage", "0", 3)),
        ("b", tensor("ByteStorage", "0", 3)),
    ]);
    for deflate in [false, true] {
        let found = read(
            &container(dir.path(), &pickle, &[("0", &[7, 8, 9])], deflate),
            "state_dict",
        )
        .unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert!(
            found
                .values()
                .all(|t| t.bytes == [7, 8, 9] && t.dtype == Dtype::U8 && t.shape == [3])
        );
    }
}

#[test]
fn a_pickle_that_calls_a_function_executes_nothing_and_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let canary = dir.path().join("canary");
    let call = |end: &[u8]| {
        [
            &b"cposix\nsystem\n"[..],
            &text(&format!("touch {}", canary.display())),
            end,
        ]
        .concat()
    };
    // Called by REDUCE, by NEWOBJ, and with the result called again.
    for end in [&b"\x85R"[..], b"\x85\x81", b"\x85R)R"] {
        let reached = container(dir.path(), &state_dict(&[("w", call(end))]), &[], false);
        assert!(problem(&reached).contains("posix.system"), "{}", problem(&reached));
        let root = [&b"\x80\x02}"[..], &text("state_dict"), &call(end), b"s."].concat();
        assert!(problem(&container(dir.path(), &root, &[], false)).contains("posix.system"));
        // Outside the requested dictionary the call is harmless; it is not executed either.
        let mut beside = [&b"\x80\x02}"[..], &text("callbacks"), &call(end), b"s"].concat();
        beside.extend(text("state_dict"));
        beside.extend(b"}");
        beside.extend(text("w"));
        beside.extend(tensor("ByteStorage", "0", 1));
        beside.extend(b"ss.");
        assert_eq!(
            read(&container(dir.path(), &beside, &[("0", &[5])], false), "state_dict").unwrap()["w"].bytes,
            [5]
        );
    }
    assert!(!canary.exists());
}

#[test]
fn unknown_storage_class_matters_only_if_requested() {
    let dir = tempfile::tempdir().unwrap();
    let wanted = state_dict(&[("w", tensor("QUInt8Storage", "0", 1))]);
    assert!(problem(&container(dir.path(), &wanted, &[("0", &[5])], false)).contains("QUInt8Storage"));
    let mut beside = [&b"\x80\x02}"[..], &text("state_dict"), b"}"].concat();
    beside.extend([text("w"), tensor("ByteStorage", "0", 1), b"ss".to_vec()].concat());
    beside.extend([text("extra"), tensor("QUInt8Storage", "1", 1), b"s.".to_vec()].concat());
    assert!(read(&container(dir.path(), &beside, &[("0", &[5])], false), "state_dict").is_ok());
}

#[test]
fn false_sizes_are_errors_before_allocation() {
    let dir = tempfile::tempdir().unwrap();
    let of = |class, numel, bytes: &[u8]| {
        let pickle = state_dict(&[("w", tensor(class, "0", numel))]);
        problem(&container(dir.path(), &pickle, &[("0", bytes)], true))
    };
    for numel in [i64::MAX, i64::MAX / 8 + 1, 1 << 40, 9] {
        assert!(of("DoubleStorage", numel, &[0; 64]).contains("`w`"), "{numel}");
    }
    assert!(of("ByteStorage", 2, &[0; 3]).contains("limit is 2"));
    // A decompression bomb: a hundred million zeros deflate to a hundred kilobytes.
    let bomb = vec![0u8; 100_000_000];
    assert!(of("ByteStorage", 100_000_000, &bomb).contains("more than 64 times"));
    // The same storage under many names.
    let entry = tensor("ByteStorage", "0", 100_000);
    let names: Vec<String> = (0..2000).map(|n| n.to_string()).collect();
    let entries: Vec<_> = names.iter().map(|name| (name.as_str(), entry.clone())).collect();
    let file = container(dir.path(), &state_dict(&entries), &[("0", &bomb[..100_000])], true);
    assert!(problem(&file).contains("times the file"));
}

#[test]
fn a_pickle_that_repeats_itself_takes_no_memory_for_each_time() {
    let dir = tempfile::tempdir().unwrap();
    let long = "x".repeat(2000);
    let times = 500_000;
    let remembered = |value: Vec<u8>| [value, b"q\x000".to_vec()].concat();
    // A class with a long name, and a dictionary of a long list.
    let class = [remembered(text(&long)), b"h\x00h\x00\x93".repeat(times)].concat();
    let pairs = [&b"]("[..], &b"K\x01K\x02\x86".repeat(10_000), b"e\x85"].concat();
    let dictionary = [
        remembered(pairs),
        b"ccollections\nOrderedDict\nq\x010".to_vec(),
        b"h\x01h\x00R".repeat(times),
    ]
    .concat();
    for pickle in [class, dictionary] {
        let file = container(dir.path(), &[&b"\x80\x02"[..], &pickle, b"."].concat(), &[], false);
        assert!(problem(&file).contains("of itself"), "{}", problem(&file));
    }
    // Strings are shared: keys of storages and names of tensors cost nothing, regardless of their length.
    let described = [
        b"(".to_vec(),
        text("storage"),
        b"ctorch\nByteStorage\n".to_vec(),
        text(&long),
    ]
    .concat();
    let described = remembered([described, text("cpu"), b"K\x01t".to_vec()].concat());
    let storages = [&b"\x80\x02"[..], &described, &b"h\x00Q0".repeat(times), b"}."].concat();
    assert!(
        read(&container(dir.path(), &storages, &[], false), "state_dict")
            .unwrap()
            .is_empty()
    );
}

#[test]
fn cut_and_scrambled_checkpoints_are_errors_and_never_panics() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/pickle");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("cut.ckpt");
    for name in ["legacy.ckpt", "zip_protocol4.ckpt", "zip_lightning.ckpt"] {
        let whole = std::fs::read(golden.join(name)).unwrap();
        for length in (0..whole.len()).step_by(7) {
            std::fs::write(&file, &whole[..length]).unwrap();
            problem(&file);
        }
        for at in (0..whole.len()).step_by(3) {
            let mut scrambled = whole.clone();
            scrambled[at] ^= 0x55;
            std::fs::write(&file, &scrambled).unwrap();
            let _ = read(&file, "state_dict");
        }
    }
}

#[test]
fn malformed_pickles_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    for pickle in [
        &b""[..],
        b".",
        b"\x80\x09.",
        b"}",
        b"t.",
        b"0.",
        b"h\x05.",
        b"(K\x01u.",
        b"}(K\x01u.",
        b"K\x01K\x02R.",
        b"N)Q.",
        b"X\xff\xff\xff\xffabc",
        b"\x8d\xff\xff\xff\xff\xff\xff\xff\xffabc",
        b"\xf0.",
        b"K\x01.",
    ] {
        problem(&container(dir.path(), pickle, &[], false));
    }
    // Longer than any checkpoint's: the number of operations is bounded.
    let endless = [&b"\x80\x02"[..], &b"N0".repeat(5_000_000)].concat();
    assert!(problem(&container(dir.path(), &endless, &[], false)).contains("operations"));
}

#[test]
fn legacy_container_is_read_and_inconsistencies_are_named() {
    let dir = tempfile::tempdir().unwrap();
    // The dictionary itself, without a key around it, as published weights have it.
    let pickle = [
        b"\x80\x02}(".to_vec(),
        text("w"),
        tensor("ShortStorage", "17", 2),
        text("v"),
        tensor("ByteStorage", "4", 3),
        b"u.".to_vec(),
    ]
    .concat();
    let of = |storages: &[(&str, i64, &[u8])]| legacy(dir.path(), true, &pickle, storages);
    let whole: [(&str, i64, &[u8]); 2] = [("4", 3, &[1, 2, 3]), ("17", 2, &[4, 0, 5, 0])];
    let found = read(&of(&whole), "state_dict").unwrap();
    assert_eq!(
        (&found["w"].bytes[..], &found["v"].bytes[..]),
        (&[4, 0, 5, 0][..], &[1, 2, 3][..])
    );
    assert!(problem(&legacy(dir.path(), false, &pickle, &whole)).contains("big-endian"));
    for (storages, named) in [
        (
            &[("4", 3, &[1, 2, 3][..]), ("17", 2, &[4, 0, 5])][..],
            "inside the storage `17`",
        ),
        (
            &[("4", 2, &[1, 2]), ("17", 2, &[4, 0, 5, 0])],
            "2 numbers in the storage `4`",
        ),
        (
            &[("4", -1, &[]), ("17", 2, &[4, 0, 5, 0])],
            "-1 numbers in the storage `4`",
        ),
        (
            &[("4", i64::MAX, &[]), ("17", 2, &[4, 0, 5, 0])],
            "numbers in the storage `4`",
        ),
        (
            &[("4", 3, &[1, 2, 3]), ("18", 2, &[4, 0, 5, 0])],
            "lists the storage `18`",
        ),
        (&[("4", 3, &[1, 2, 3]), ("4", 3, &[1, 2, 3])], "lists the storage `4`"),
        (&[("4", 3, &[1, 2, 3])], "lacks the storage `17`"),
    ] {
        let problem = problem(&of(storages));
        assert!(problem.contains(named), "{problem}; expected {named}");
    }
    let cut = std::fs::read(of(&whole)).unwrap();
    std::fs::write(dir.path().join("cut"), &cut[..cut.len() - 8]).unwrap();
    assert!(problem(&dir.path().join("cut")).contains("before the storage `17`"));
    // One storage with two kinds of numbers, and one that fits into no memory.
    let twice = state_dict(&[
        ("a", tensor("ByteStorage", "4", 3)),
        ("b", tensor("CharStorage", "4", 3)),
    ]);
    assert!(problem(&legacy(dir.path(), true, &twice, &whole[..1])).contains("in two ways"));
    let huge = state_dict(&[("a", tensor("DoubleStorage", "4", i64::MAX))]);
    let file = legacy(dir.path(), true, &huge, &[("4", i64::MAX, &[0; 8])]);
    assert!(problem(&file).contains("storage `4`"), "{}", problem(&file));
    // A global that would have to be executed is named.
    let call = state_dict(&[("a", b"cposix\nsystem\n)R".to_vec())]);
    assert!(problem(&legacy(dir.path(), true, &call, &[])).contains("posix.system"));
}
