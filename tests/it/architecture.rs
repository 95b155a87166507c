//! Which module of the server may use which. The boundaries of crates are enforced by the compiler.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A module and the modules that it may use. Those in [`EVERYWHERE`] may be used everywhere.
const MAY_USE: &[(&str, &[&str])] = &[
    ("cluster", &["registry"]),
    ("jobs", &["cluster", "registry"]),
    ("service", &["jobs", "cluster", "registry"]),
    ("api", &["service", "jobs", "cluster", "registry"]),
    ("app", &["api", "service", "jobs", "cluster", "registry"]),
    (
        "cli",
        &["app", "api", "service", "jobs", "cluster", "registry", "client"],
    ),
    ("client", &[]),
    ("config", &[]),
    ("decoders", &[]),
    ("pool", &[]),
    ("priority", &[]),
    ("telemetry", &[]),
];
const EVERYWHERE: &[&str] = &["config", "decoders", "pool", "priority", "telemetry"];

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The code without test-only items. Code after such an item is kept.
fn without_tests(text: &str) -> String {
    let mut code = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let indent = &line[..line.len() - line.trim_start().len()];
        if line.trim() != "#[cfg(test)]" {
            code.push_str(line);
            code.push('\n');
            continue;
        }
        // In rustfmt's format the item continues with lines of deeper indentation, and ends with a line of its own
        // indentation that ends a statement or a block.
        for line in lines.by_ref() {
            let depth = &line[..line.len() - line.trim_start().len()];
            let attribute = line.trim_start().starts_with("#[") || line.trim_start().starts_with("//");
            if depth == indent && !attribute && line.ends_with([';', '}', ',']) {
                break;
            }
        }
    }
    code
}

#[test]
fn code_after_a_test_item_is_checked() {
    let text = "use a;\n#[cfg(test)]\nmod tests;\nfn b() {\n    #[cfg(test)]\n    {\n        c();\n    }\n    d();\n}\n\
                #[cfg(test)]\n#[derive(Debug)]\npub struct E {\n    f: G,\n}\nstruct H {\n    #[cfg(test)]\n    i: J,\n    k: L,\n}\n\
                #[cfg(test)]\nmod m {\n    fn n() {\n        o();\n    }\n}\nfn p() {}\n";
    let kept = "use a;\nfn b() {\n    d();\n}\nstruct H {\n    k: L,\n}\nfn p() {}\n";
    assert_eq!(without_tests(text), kept);
    // In the real files, nothing but the items with the attribute is left out.
    for (file, code) in modules().into_values().flatten() {
        let text = std::fs::read_to_string(&file).unwrap();
        if !text.contains("#[cfg(test)]") {
            assert_eq!(code, text, "{}", file.display());
        }
        let balance = |text: &str, open: char, close: char| text.matches(open).count() == text.matches(close).count();
        if balance(&text, '{', '}') {
            assert!(balance(&code, '{', '}'), "{}: cut in the middle", file.display());
        }
    }
    let generations = &modules()["registry"];
    let generations = generations
        .iter()
        .find(|(file, _)| file.ends_with("src/generations.rs"));
    assert!(generations.unwrap().1.contains("pub async fn delete_generation"));
}

/// The registry is a crate of its own and counts as a module.
fn registry() -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/coar-registry/src"),
        &mut files,
    );
    let read = |file: PathBuf| {
        let text = std::fs::read_to_string(&file).unwrap();
        (file, without_tests(&text))
    };
    files.into_iter().map(read).collect()
}

/// Source files by module, without their unit tests.
fn modules() -> BTreeMap<String, Vec<(PathBuf, String)>> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&src, &mut files);
    let mut modules: BTreeMap<String, Vec<_>> = BTreeMap::new();
    modules.insert("registry".into(), registry());
    for file in files {
        let inside = file.strip_prefix(&src).unwrap();
        let module = inside
            .iter()
            .next()
            .unwrap()
            .to_string_lossy()
            .trim_end_matches(".rs")
            .to_owned();
        let text = std::fs::read_to_string(&file).unwrap();
        modules.entry(module).or_default().push((file, without_tests(&text)));
    }
    modules.remove("main");
    modules.remove("lib");
    modules
}

fn used_modules(code: &str) -> BTreeSet<String> {
    code.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| {
            line.match_indices("crate::")
                .map(|(at, _)| &line[at + 7..])
                .collect::<Vec<_>>()
        })
        .map(|rest| {
            rest.chars()
                .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
                .collect()
        })
        .collect()
}

#[test]
fn modules_use_only_what_the_table_allows() {
    let mut faults = Vec::new();
    for (module, files) in modules() {
        if module == "registry" {
            // The compiler enforces this: its crate depends only on `coar-core`.
            continue;
        }
        let allowed = MAY_USE
            .iter()
            .find(|(name, _)| *name == module)
            .map(|(_, allowed)| *allowed);
        let Some(allowed) = allowed else {
            faults.push(format!("the module `{module}` is not in the table"));
            continue;
        };
        for (file, code) in files {
            for used in used_modules(&code) {
                if used != module && !allowed.contains(&used.as_str()) && !EVERYWHERE.contains(&used.as_str()) {
                    faults.push(format!("{}: `{module}` uses `{used}`", file.display()));
                }
            }
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn only_http_names_status_codes() {
    let mut faults = Vec::new();
    for (module, files) in modules() {
        for (file, code) in files {
            let named = |what: &str| {
                // Whole words only: `watch::` is not `tch::`.
                let whole = |line: &str| {
                    line.match_indices(what)
                        .any(|(at, _)| !line[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_'))
                };
                code.lines()
                    .any(|line| !line.trim_start().starts_with("//") && whole(line))
            };
            // `cluster` has a listener of its own for other processes.
            if named("StatusCode::") && !matches!(module.as_str(), "api" | "cluster") {
                faults.push(format!("{}: names HTTP status codes", file.display()));
            }
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// Lines of a function that use a second connection or the blob store while a transaction is open.
fn outside_of_transaction(code: &str) -> Vec<&str> {
    let (mut open, mut found) = (false, Vec::new());
    for line in code.lines() {
        open |= line.contains("self.write().await");
        // Committed, rolled back, or the end of the function.
        if line.contains("transaction.commit()") || line.contains("drop(transaction)") || line == "    }" {
            open = false;
        }
        let asks = ["self.pools", "self.lease_time()", "self.blobs", "self.store("];
        if open && asks.iter().any(|what| line.contains(what)) {
            found.push(line.trim());
        }
    }
    found
}

#[test]
fn what_is_read_inside_a_transaction_is_read_through_it() {
    let wrong = "    fn a() {\n let t = self.write().await?;\n self.lease_time().await?;\n transaction.commit();\n self.pools;\n    }\n";
    assert_eq!(outside_of_transaction(wrong), ["self.lease_time().await?;"]);
    let mut transactions = 0;
    for (file, code) in &modules()["registry"] {
        transactions += code.matches("self.write().await").count();
        let found = outside_of_transaction(code);
        assert!(found.is_empty(), "{}: {found:#?}", file.display());
    }
    assert!(transactions > 20, "transactions are no longer found by this name");
}
