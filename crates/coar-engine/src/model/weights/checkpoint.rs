//! Safetensors files on disk, memory-mapped: one file, or the shards of a Hugging Face checkpoint folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};
use safetensors::tensor::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::{Target, TensorSource};
use crate::model::ModelError;
use crate::model::files::check_download;

#[derive(Debug)]
struct Shard {
    file: PathBuf,
    map: Mmap,
    /// Offset of the data after the header.
    data: usize,
}

#[derive(Debug, Clone)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    from: usize,
    to: usize,
}

/// An opened checkpoint; tensors are copied out of the map one at a time, in the target's kind and onto its device.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    target: Target,
    root: PathBuf,
}

/// The libtorch kind of a safetensors dtype; `None` for kinds that libtorch lacks.
pub(super) fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

/// Prefix of the image tokenizer's tensors in a checkpoint.
const IMAGE_TOKENIZER: &str = "model.vqmodel.";

/// One of the two networks in a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    LanguageModel,
    ImageTokenizer,
}

impl Part {
    /// The name of a tensor within the part; `None` if it belongs to the other one.
    fn name(self, full: &str) -> Option<&str> {
        match (self, full.strip_prefix(IMAGE_TOKENIZER)) {
            (Self::LanguageModel, None) => Some(full),
            (Self::ImageTokenizer, Some(name)) => Some(name),
            _ => None,
        }
    }
}

fn open_shard(file: &Path, index: usize, part: Part) -> Result<(Shard, BTreeMap<String, Entry>), ModelError> {
    check_download(file)?;
    let handle = File::open(file).map_err(|error| ModelError::file(file, error))?;
    // SAFETY: the map is only read. Truncating a checkpoint under a running server makes reads of the map fault;
    // checkpoints must not be modified after they are written.
    let map = unsafe { Mmap::map(&handle) }.map_err(|error| ModelError::file(file, error))?;
    // This also compares the file's length with the header.
    let (header, metadata) = SafeTensors::read_metadata(&map)
        .map_err(|error| ModelError::file(file, format!("not a complete safetensors file: {error}")))?;
    let data = header + 8;
    let mut entries = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let Some(name) = part.name(&name).map(str::to_owned) else {
            continue;
        };
        // An empty tensor may declare any other dimensions: the header's own check multiplies them to 0.
        let shape: Option<Vec<i64>> = info.shape.iter().map(|&n| i64::try_from(n).ok()).collect();
        let shape = shape.filter(|shape| {
            let product = shape.iter().try_fold(1i64, |product, &n| product.checked_mul(n.max(1)));
            shape.len() <= MAX_DIMENSIONS && product.is_some()
        });
        let Some(shape) = shape else {
            let problem = format!("claims the shape {:?}, which no tensor has", info.shape);
            return Err(ModelError::Tensor {
                file: file.to_owned(),
                tensor: name,
                problem,
            });
        };
        let (from, to) = info.data_offsets;
        entries.insert(
            name,
            Entry {
                shard: index,
                dtype: info.dtype,
                shape,
                from,
                to,
            },
        );
    }
    Ok((
        Shard {
            file: file.to_owned(),
            map,
            data,
        },
        entries,
    ))
}

/// Parses `model.safetensors.index.json`: names of tensors by the file in the same folder that contains them.
///
/// # Errors
/// What is wrong with it.
pub fn index_of(text: &str) -> Result<BTreeMap<String, Vec<String>>, String> {
    let parsed: serde_json::Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let weight_map = parsed
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or("lacks `weight_map`")?;
    let mut by_shard: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let shard = shard
            .as_str()
            .filter(|name| !name.contains(['/', '\\', '\0']) && !matches!(*name, "" | "." | ".."))
            .ok_or_else(|| format!("has no plain file name for `{tensor}`"))?;
        by_shard.entry(shard.to_owned()).or_default().push(tensor.clone());
    }
    Ok(by_shard)
}

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// libtorch's own limit.
const MAX_DIMENSIONS: usize = 64;

impl Checkpoint {
    /// Opens `model.safetensors.index.json` with its shards, or a single `model.safetensors`.
    ///
    /// # Errors
    /// When neither exists, a shard is missing or truncated, or the index names a tensor that its shard lacks.
    pub fn open_dir(dir: &Path, target: Target) -> Result<Self, ModelError> {
        Self::open_part(dir, target, Part::LanguageModel)
    }

    /// Opens the image tokenizer in the same files: the tensors `model.vqmodel.*`, without this prefix.
    ///
    /// # Errors
    /// As [`Self::open_dir`].
    pub fn open_image_tokenizer(dir: &Path, target: Target) -> Result<Self, ModelError> {
        Self::open_part(dir, target, Part::ImageTokenizer)
    }

    /// Whether a checkpoint folder has a tensor of the image tokenizer; false if it cannot be read.
    pub fn names_image_tensor(dir: &Path, name: &str) -> bool {
        let full = format!("{IMAGE_TOKENIZER}{name}");
        match std::fs::read_to_string(dir.join(INDEX)) {
            Ok(text) => index_of(&text).is_ok_and(|shards| shards.values().flatten().any(|tensor| *tensor == full)),
            Err(_) => open_shard(&dir.join(SINGLE), 0, Part::ImageTokenizer)
                .is_ok_and(|(_, entries)| entries.contains_key(name)),
        }
    }

    fn open_part(dir: &Path, target: Target, part: Part) -> Result<Self, ModelError> {
        let index = dir.join(INDEX);
        // A link that leads nowhere is reported as such.
        if index.symlink_metadata().is_err() {
            let single = dir.join(SINGLE);
            if single.symlink_metadata().is_err() {
                return Err(ModelError::file(dir, format!("holds neither {INDEX} nor {SINGLE}")));
            }
            return Self::open_single(&single, target, part);
        }
        check_download(&index)?;
        let text = std::fs::read_to_string(&index).map_err(|error| ModelError::file(&index, error))?;
        let by_shard = index_of(&text).map_err(|problem| ModelError::file(&index, problem))?;
        let mut checkpoint = Self {
            shards: vec![],
            entries: BTreeMap::new(),
            target,
            root: dir.to_owned(),
        };
        for (shard, tensors) in by_shard {
            let file = dir.join(&shard);
            let unfinished = dir.join(format!("{shard}.incomplete"));
            if file.symlink_metadata().is_err() && !unfinished.exists() {
                let problem = format!("is missing; the index lists {} tensors in it", tensors.len());
                return Err(ModelError::file(&file, problem));
            }
            let (opened, mut entries) = open_shard(&file, checkpoint.shards.len(), part)?;
            checkpoint.shards.push(opened);
            // Only what the index names: it decides if two shards contain the same tensor.
            for tensor in tensors {
                let Some(name) = part.name(&tensor) else { continue };
                let Some((name, entry)) = entries.remove_entry(name) else {
                    return Err(ModelError::Tensor {
                        file,
                        tensor,
                        problem: "is missing; the index lists it in this file".to_owned(),
                    });
                };
                checkpoint.entries.insert(name, entry);
            }
        }
        Ok(checkpoint)
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// When it is missing, truncated or not a safetensors file.
    pub fn open_file(file: &Path, target: Target) -> Result<Self, ModelError> {
        Self::open_single(file, target, Part::LanguageModel)
    }

    fn open_single(file: &Path, target: Target, part: Part) -> Result<Self, ModelError> {
        let (shard, entries) = open_shard(file, 0, part)?;
        Ok(Self {
            shards: vec![shard],
            entries,
            target,
            root: file.to_owned(),
        })
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The dtype of a tensor on disk.
    pub fn dtype_of(&self, name: &str) -> Option<Dtype> {
        self.entries.get(name).map(|entry| entry.dtype)
    }

    /// Size in bytes of all tensors on disk.
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| (entry.to - entry.from) as u64).sum()
    }

    /// Number of values in all tensors.
    pub fn parameters(&self) -> u64 {
        self.entries
            .values()
            .map(|entry| entry.shape.iter().product::<i64>() as u64)
            .sum()
    }

    /// A fingerprint of these weights: SHA-256 over names, shapes, dtypes and the first 4 KiB of every tensor, in
    /// hex. Concepts record it, since they only fit the model that they were trained on.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for (name, entry) in &self.entries {
            let bytes = self.slice(entry);
            hash.update(name.as_bytes());
            hash.update(format!("{:?}{:?}", entry.dtype, entry.shape).as_bytes());
            hash.update(&bytes[..bytes.len().min(4096)]);
        }
        hex::encode(hash.finalize())
    }

    fn slice(&self, entry: &Entry) -> &[u8] {
        let shard = &self.shards[entry.shard];
        &shard.map[shard.data + entry.from..shard.data + entry.to]
    }

    /// Any tensor as it is on disk, copied, on the CPU.
    ///
    /// # Errors
    /// When it is absent or libtorch has no such kind.
    pub fn raw(&self, name: &str) -> Result<Tensor, ModelError> {
        let entry = self.entry(name)?;
        self.copy(name, entry, None)
    }

    fn entry(&self, name: &str) -> Result<&Entry, ModelError> {
        self.entries.get(name).ok_or_else(|| ModelError::Tensor {
            file: self.root.clone(),
            tensor: name.to_owned(),
            problem: "is missing".to_owned(),
        })
    }

    fn copy(&self, name: &str, entry: &Entry, target: Option<Target>) -> Result<Tensor, ModelError> {
        let shard = &self.shards[entry.shard];
        let fault = |problem: String| ModelError::Tensor {
            file: shard.file.clone(),
            tensor: name.to_owned(),
            problem,
        };
        let kind = kind_of(entry.dtype).ok_or_else(|| fault(format!("is {:?}, which cannot be read", entry.dtype)))?;
        let bytes = self.slice(entry);
        let strides: Vec<i64> = (0..entry.shape.len())
            .map(|dim| entry.shape[dim + 1..].iter().map(|n| n.max(&1)).product())
            .collect();
        // If the kind or device changes the view is read straight from the map without a second copy; otherwise a
        // copy is forced, so no tensor refers to the map.
        let aligned = (bytes.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes());
        let view = if aligned && !bytes.is_empty() {
            // SAFETY: the header's check guarantees that the slice contains exactly the shape's numbers; the view is
            // dropped before the map.
            unsafe { Tensor::f_from_blob(bytes.as_ptr(), &entry.shape, &strides, kind, Device::Cpu)? }
        } else {
            // The header may be unpadded.
            Tensor::f_from_data_size(bytes, &entry.shape, kind)?
        };
        let copied = match target {
            Some(target) if target.kind != kind || target.device != Device::Cpu => {
                view.f_to_device_(target.device, target.kind, false, true)?
            }
            _ => view.f_detach_copy()?,
        };
        // The pages were read once; keeping them would double the memory in use.
        let page = 4096;
        let from = (shard.data + entry.from).next_multiple_of(page);
        let to = (shard.data + entry.to) / page * page;
        if to > from {
            // SAFETY: dropping clean pages of a read-only file map changes nothing but residency.
            let _ = unsafe {
                shard
                    .map
                    .unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from)
            };
        }
        let _ = shard.map.advise(Advice::Normal);
        Ok(copied)
    }
}

impl TensorSource for Checkpoint {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let entry = self.entry(name)?;
        if entry.shape != shape {
            return Err(ModelError::Tensor {
                file: self.shards[entry.shard].file.clone(),
                tensor: name.to_owned(),
                problem: format!("has shape {:?}; expected {shape:?}", entry.shape),
            });
        }
        if !matches!(entry.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(ModelError::Tensor {
                file: self.shards[entry.shard].file.clone(),
                tensor: name.to_owned(),
                problem: format!("is {:?}; expected floating-point numbers", entry.dtype),
            });
        }
        self.copy(name, entry, Some(self.target))
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.entries.get(name).map(|entry| entry.shape.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: Target = Target {
        kind: Kind::Float,
        device: Device::Cpu,
    };

    /// A safetensors file of a raw header and data.
    fn write(file: &Path, header: &str, data: &[u8]) {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        std::fs::write(file, bytes).unwrap();
    }

    fn halves(values: &[f32]) -> Vec<u8> {
        values
            .iter()
            .flat_map(|&value| half::bf16::from_f32(value).to_le_bytes())
            .collect()
    }

    fn problem(result: Result<Checkpoint, ModelError>) -> String {
        result.expect_err("a broken checkpoint was opened").to_string()
    }

    #[test]
    fn tensors_are_copied_in_the_target_kind_at_any_alignment() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        let body = r#"{"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]},"e":{"dtype":"F32","shape":[0,4],"data_offsets":[8,8]}}"#;
        for pad in 0..4 {
            write(
                &file,
                &format!("{body}{}", " ".repeat(pad)),
                &halves(&[1.0, -2.0, 0.5, 3.0]),
            );
            let tensor = {
                let checkpoint = Checkpoint::open_dir(dir.path(), TARGET).unwrap();
                assert_eq!(checkpoint.tensor("e", &[0, 4]).unwrap().size(), [0, 4]);
                assert_eq!(checkpoint.raw("a").unwrap().kind(), Kind::BFloat16);
                checkpoint.tensor("a", &[2, 2]).unwrap()
            };
            // The map was dropped, so the tensor must not refer to it.
            assert_eq!(
                Vec::<f32>::try_from(&tensor.reshape([-1])).unwrap(),
                [1.0, -2.0, 0.5, 3.0]
            );
        }
    }

    #[test]
    fn truncated_and_oversized_files_are_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        write(
            &file,
            r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#,
            &halves(&[1.0, 2.0]),
        );
        let whole = std::fs::read(&file).unwrap();
        assert!(Checkpoint::open_file(&file, TARGET).is_ok());
        for length in 0..whole.len() {
            std::fs::write(&file, &whole[..length]).unwrap();
            assert!(problem(Checkpoint::open_file(&file, TARGET)).contains("model.safetensors"));
        }
        std::fs::write(&file, [&whole[..], b"x"].concat()).unwrap();
        problem(Checkpoint::open_file(&file, TARGET));
    }

    #[test]
    fn invalid_headers_are_errors_and_never_panics() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        for header in [
            "",
            "{",
            "[]",
            r#"{"a":{"dtype":"BF16","shape":[3],"data_offsets":[0,4]}}"#,
            r#"{"a":{"dtype":"Q7","shape":[2],"data_offsets":[0,4]}}"#,
            r#"{"a":{"dtype":"BF16","shape":[-2],"data_offsets":[0,4]}}"#,
            r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[4,0]}}"#,
            r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[2,6]}}"#,
            r#"{"a":{"dtype":"BF16","shape":[4611686018427387904,4],"data_offsets":[0,4]}}"#,
            r#"{"a":{"dtype":"BF16","shape":[0,4611686018427387904,4],"data_offsets":[0,0]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#,
            r#"{"a":{"dtype":"BF16","shape":[0,18446744073709551615],"data_offsets":[0,0]},"b":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#,
        ] {
            write(&file, header, &halves(&[1.0, 2.0]));
            problem(Checkpoint::open_file(&file, TARGET));
        }
        // A header longer than the file, and one longer than any file.
        for length in [1u64 << 20, u64::MAX] {
            std::fs::write(&file, [&length.to_le_bytes()[..], b"{}"].concat()).unwrap();
            problem(Checkpoint::open_file(&file, TARGET));
        }
    }

    #[test]
    fn mismatches_name_file_tensor_and_expectation() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        let header = r#"{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"n":{"dtype":"I16","shape":[2],"data_offsets":[4,8]},"model.vqmodel.x":{"dtype":"BF16","shape":[2],"data_offsets":[8,12]}}"#;
        write(&file, header, &halves(&[1.0; 6]));
        let checkpoint = Checkpoint::open_file(&file, TARGET).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "n"]);
        assert_eq!(checkpoint.bytes(), 8);
        for (name, shape, expected) in [("a", [3], "[3]"), ("n", [2], "I16"), ("b", [2], "missing")] {
            let error = checkpoint.tensor(name, &shape).unwrap_err().to_string();
            let parts = ["model.safetensors", &format!("`{name}`"), expected];
            assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        }
    }

    #[test]
    fn an_index_must_agree_with_its_shards() {
        let dir = tempfile::tempdir().unwrap();
        let one = r#"{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"b":{"dtype":"BF16","shape":[1],"data_offsets":[2,4]}}"#;
        write(&dir.path().join("one"), one, &halves(&[1.0, 2.0]));
        write(&dir.path().join("two"), one, &halves(&[3.0, 4.0]));
        let open = |index: &str| {
            std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
            Checkpoint::open_dir(dir.path(), TARGET)
        };
        // Both shards contain both tensors: the index decides.
        let checkpoint = open(r#"{"weight_map":{"a":"two","b":"one"}}"#).unwrap();
        let value = |name| checkpoint.tensor(name, &[1]).unwrap().double_value(&[0]);
        assert_eq!((value("a"), value("b")), (3.0, 2.0));
        assert!(problem(open(r#"{"weight_map":{"a":"one","c":"two"}}"#)).contains("`c`"));
        assert!(problem(open(r#"{"weight_map":{"a":"three"}}"#)).contains("three"));
        for index in [
            "{",
            "[]",
            "{}",
            r#"{"weight_map":{"a":7}}"#,
            r#"{"weight_map":{"a":"../one"}}"#,
            r#"{"weight_map":{"a":".."}}"#,
        ] {
            problem(open(index));
        }
    }
}
