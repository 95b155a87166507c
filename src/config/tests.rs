//! Settings from flags, variables and the file.

use clap::FromArgMatches;

use super::*;

fn parse(arguments: &[&str]) -> Config {
    // The environment of the test run must have no effect.
    let command = Config::augment_args(Command::new("config").no_binary_name(true))
        .mut_args(|arg| arg.env(clap::builder::Resettable::Reset));
    Config::from_arg_matches(&command.get_matches_from(arguments)).unwrap()
}

#[test]
fn the_defaults_are_valid_and_every_fault_is_told() {
    assert_eq!(parse(&[]).validate(), Ok(()));
    let bad = parse(&[
        "--training-share=2",
        "--rows=1",
        "--cors-origin=example.com",
        "--public-url=ftp://x",
    ]);
    let Faults(faults) = bad.validate().unwrap_err();
    let keys: Vec<_> = faults.iter().filter_map(|fault| fault.split(' ').next()).collect();
    assert_eq!(keys, ["training_share", "rows", "public_url", "cors_origin"]);
}

#[test]
fn changed_settings_are_those_that_differ_from_their_defaults() {
    assert_eq!(parse(&[]).changed(), Vec::<String>::new());
    let changed = parse(&[
        "--rows=8",
        "--training-share=0.25",
        "--cors-origin=*",
        "--kv-memory=100",
    ])
    .changed();
    assert_eq!(
        changed,
        [
            "cors_origin = [\"*\"]",
            "training_share = 0.25",
            "kv_memory = 100",
            "rows = 8"
        ]
    );
}

#[test]
fn passwords_are_not_shown() {
    let config = parse(&["--database=postgres://coar:geheim@db.example:5432/coar?sslpassword=geheim"]);
    let text = config.to_toml();
    assert!(text.contains("postgres://coar:***@db.example:5432/coar"), "{text}");
    assert!(!text.contains("geheim"));
    assert_eq!(shown("geheim"), "***");
    assert_eq!(shown("postgres://u:pass:word@x@h/d"), "postgres://u:***@h/d");
    let Faults(faults) = parse(&["--database=mysql://u:geheim@h/d", "--role=worker"])
        .validate()
        .unwrap_err();
    assert!(!faults.concat().contains("geheim"));
    assert!(faults[0].starts_with("database is mysql://u:***@h/d"));
    let Faults(faults) = parse(&["--role=api", "--blobs=ftp://x"]).validate().unwrap_err();
    let keys: Vec<_> = faults.iter().filter_map(|fault| fault.split(' ').next()).collect();
    assert_eq!(keys, ["blobs", "role"]);
}

#[test]
fn origins_have_any_scheme() {
    let good = [
        "https://app.example.com",
        "http://localhost:3000",
        "http://[::1]:3000",
        "app://obsidian.md",
        "tauri://localhost",
        "chrome-extension://abcdefghijklmnop",
        "*",
    ];
    for origin in good {
        let config = parse(&[&format!("--cors-origin={origin}")]);
        assert_eq!(config.validate(), Ok(()), "{origin}");
    }
    for origin in [
        "null",
        "example.com",
        "https://",
        "://host",
        "https://a.example/path",
        "https://a.example/",
        "1a://b",
        "a b://c",
        "https://user@host",
    ] {
        let config = parse(&[&format!("--cors-origin={origin}")]);
        assert!(config.validate().is_err(), "{origin}");
    }
}

#[test]
fn every_setting_is_a_flag_a_variable_and_a_key_of_one_name() {
    let command = Config::augment_args(Command::new("config"));
    for arg in command.get_arguments() {
        let flag = arg.get_long().unwrap();
        let variable = format!("COAR_{}", flag.replace('-', "_").to_uppercase());
        assert_eq!(arg.get_env().and_then(|name| name.to_str()), Some(variable.as_str()));
        assert!(arg.get_help().is_some(), "{flag} is not described");
        assert!(flag == "config" || arg.get_id() == flag.replace('-', "_").as_str());
    }
}

#[test]
fn a_file_that_was_shown_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("coar.toml");
    let shown = parse(&[
        "--cors-origin=https://a.example,https://b.example",
        "--metrics-open",
        "--model-alias=gpt-image-2=coar,dall-e-3=coar:rex",
        "--response-format=url",
    ])
    .to_toml();
    std::fs::write(&path, &shown).unwrap();
    let settings = read_file(&path).unwrap();
    let of = |key: &str| {
        settings
            .iter()
            .find(|(name, _)| name == key)
            .map(|(_, values)| values.clone())
    };
    assert_eq!(of("cors_origin").unwrap(), ["https://a.example", "https://b.example"]);
    assert_eq!(of("metrics_open").unwrap(), ["on"]);
    assert_eq!(of("model_alias").unwrap(), ["gpt-image-2=coar", "dall-e-3=coar:rex"]);
    assert_eq!(of("response_format").unwrap(), ["url"]);
    std::fs::write(&path, "rows = \"many\"\ncolour = 1\nqueue = 3\n[table]\n").unwrap();
    let Faults(faults) = read_file(&path).unwrap_err();
    assert_eq!(faults.len(), 3, "{faults:?}");
}
