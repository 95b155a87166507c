//! Every parser of untrusted bytes as a function of bytes, with the properties of its result. `fuzz/` runs them
//! under a fuzzer; the test below replays the inputs that were found, without any tool.
//!
//! A target panics if the parser does, or if a property is violated: a limit exceeded, a failed round trip, an
//! invalid name. Memory use is checked by `fuzz/`.

mod seeds;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::path::Path;

use crate::eval::judges::fuzzing as judges;
use coar::jobs::AddressPolicy;
use coar_core::concept::file::ConceptFile;
use coar_core::concept::{PromptPiece, concept_names, is_slug, parse_prompt};
use coar_core::tokenizer::{TextTokenizer, Vocabulary};
use coar_core::training::spec::TrainingSpec;
use coar_engine::model::config::ModelConfig;
use coar_engine::model::vqgan::VqganConfig;
use coar_engine::model::weights::{Checkpoint, Target as Place, index_of, pickle};

pub use seeds::seeds;

/// One parser.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    pub name: &'static str,
    /// Maximum number of bytes that a run may have allocated at any time, besides its input.
    pub memory: usize,
    pub run: fn(&[u8]),
}

const fn target(name: &'static str, memory: usize, run: fn(&[u8])) -> Target {
    Target { name, memory, run }
}

const MIB: usize = 1 << 20;

/// All targets.
pub const TARGETS: [Target; 20] = [
    target("picture", 96 * MIB, coar_core::image::fuzzing::image),
    target("picture_header", 2 * MIB, coar_core::image::fuzzing::header),
    target("concept_file", 4 * MIB, concept_file),
    target("checkpoint", 4 * MIB, checkpoint),
    target("checkpoint_index", 4 * MIB, checkpoint_index),
    target("pickle", 16 * MIB, pickle),
    target("tokenizer", 64 * MIB, tokenizer),
    target("model_config", 4 * MIB, model_config),
    target("vqgan_config", 16 * MIB, vqgan_config),
    target("judge_config", 4 * MIB, judge_config),
    target("clip_tokenizer", 64 * MIB, clip_tokenizer),
    target("settings", 16 * MIB, settings),
    target("training_spec", 4 * MIB, training_spec),
    target("prompt", 4 * MIB, prompt),
    target("archive", 4 * MIB, coar::service::fuzzing::archive),
    target("form", 8 * MIB, coar::api::fuzzing::form),
    target("json_body", 4 * MIB, coar::api::fuzzing::json_body),
    target("head", 4 * MIB, coar::api::fuzzing::head),
    target("webhook_address", 4 * MIB, webhook_address),
    target("frames", 8 * MIB, frames),
];

/// Wraps a parser of files, fed from memory.
fn in_file<T>(bytes: &[u8], read: impl FnOnce(&Path) -> T) -> T {
    // SAFETY: a fresh descriptor, which `File` owns from here.
    let mut file = unsafe { File::from_raw_fd(libc::memfd_create(c"fuzzed".as_ptr(), 0)) };
    file.write_all(bytes).expect("memory takes what is written");
    read(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))
}

/// An accepted file round-trips.
fn concept_file(bytes: &[u8]) {
    let Ok(file) = ConceptFile::from_bytes(bytes) else {
        return;
    };
    let tensors = &file.tensors;
    assert!(is_slug(&file.header.name));
    assert_eq!(
        tensors.text.len(),
        tensors.layers * tensors.text_tokens * tensors.hidden
    );
    assert_eq!(
        tensors.image.len(),
        tensors.layers * tensors.image_tokens * tensors.hidden
    );
    assert!(
        tensors
            .text
            .iter()
            .chain(&tensors.image)
            .all(|number| number.is_finite())
    );
    let again = file.to_bytes().expect("what was read can be written");
    let again = ConceptFile::from_bytes(&again).expect("what was written can be read");
    assert_eq!(again.tensors, file.tensors);
    assert!(same(&again.header.spec, &file.header.spec));
    assert!(again.header.losses.keys().eq(file.header.losses.keys()));
}

/// Whether two specs are equal, except for the last bits of their numbers: `serde_json` parses long decimals to
/// within one.
fn same(one: &TrainingSpec, other: &TrainingSpec) -> bool {
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a.abs();
    let rates = TrainingSpec {
        learning_rate: one.learning_rate,
        prior_weight: one.prior_weight,
        regularisation_weight: one.regularisation_weight,
        focus: one.focus,
        ..other.clone()
    };
    rates == *one
        && close(one.learning_rate, other.learning_rate)
        && close(one.prior_weight, other.prior_weight)
        && close(one.regularisation_weight, other.regularisation_weight)
        && close(one.focus, other.focus)
}

/// Every accepted tensor can be read, and has the number of values of its shape.
fn checkpoint(bytes: &[u8]) {
    let place = Place {
        kind: tch::Kind::Float,
        device: tch::Device::Cpu,
    };
    let opened = in_file(bytes, |file| Checkpoint::open_file(file, place));
    let Ok(checkpoint) = opened else { return };
    assert!(checkpoint.bytes() <= bytes.len() as u64);
    assert_eq!(checkpoint.fingerprint().len(), 64);
    for name in checkpoint.names().take(8) {
        let Ok(tensor) = checkpoint.raw(name) else { continue };
        assert_eq!(tensor.size().iter().product::<i64>(), tensor.numel() as i64);
        assert!(tensor.numel() <= 8 * bytes.len());
    }
}

fn checkpoint_index(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(shards) = index_of(text) else { return };
    for shard in shards.keys() {
        assert!(
            !shard.contains(['/', '\\', '\0']) && !matches!(shard.as_str(), "" | "." | ".."),
            "{shard:?}"
        );
    }
}

/// Tensors are no larger than the limit for the file, and have the size of their shapes.
fn pickle(bytes: &[u8]) {
    let Ok(tensors) = in_file(bytes, |file| pickle::read(file, "state_dict")) else {
        return;
    };
    let mut total = 0;
    for tensor in tensors.values() {
        let numbers: i64 = tensor.shape.iter().product();
        assert_eq!(numbers as usize * tensor.dtype.bitsize() / 8, tensor.bytes.len());
        total += tensor.bytes.len();
    }
    assert!(total <= 64 * bytes.len());
}

/// An accepted tokenizer encodes a prompt, or returns an error.
fn tokenizer(bytes: &[u8]) {
    let Ok(tokenizer) = TextTokenizer::from_bytes(bytes) else {
        return;
    };
    let names: BTreeMap<String, i64> = tokenizer.names();
    if let Ok(vocabulary) = Vocabulary::from_names(&names) {
        for code in 0..vocabulary.code_count() as i64 {
            let id = vocabulary.code_to_id(code).expect("every code has an id");
            assert_eq!(vocabulary.id_to_code(id), Some(code));
        }
    }
    let _ = tokenizer.encode("A photo of a red <rex> cat, \u{fc}ber 3 <eoss>\n");
}

/// Heads and layers of an accepted configuration are consistent.
fn model_config(bytes: &[u8]) {
    let Ok(config) = in_file(bytes, ModelConfig::read) else {
        return;
    };
    assert_eq!(config.head_dim() * config.num_attention_heads, config.hidden_size);
    assert!(config.num_hidden_layers > 0 && config.head_dim() % 2 == 0);
}

fn vqgan_config(bytes: &[u8]) {
    let Ok(config) = in_file(bytes, VqganConfig::read) else {
        return;
    };
    assert!(config.pixels_per_code().is_power_of_two());
    let again = config.to_yaml().expect("what was read can be written");
    assert_eq!(
        in_file(again.as_bytes(), VqganConfig::read).as_ref().ok(),
        Some(&config)
    );
}

/// The first byte selects the kind: DINO's or CLIP's `config.json`, or `preprocessor_config.json` for one of them.
fn judge_config(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else {
        return;
    };
    in_file(rest, |file| judges::config(first % 4, file));
}

/// `vocab.json`, NUL, `merges.txt`.
fn clip_tokenizer(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (vocab, merges) = text.split_once('\0').unwrap_or((text, ""));
    judges::tokenizer(vocab, merges);
}

/// The operator's TOML file.
fn settings(bytes: &[u8]) {
    let Ok(settings) = in_file(bytes, coar::config::read_file) else {
        return;
    };
    assert!(
        settings
            .iter()
            .all(|(key, _)| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'))
    );
}

/// An accepted spec is within its limits, has a prompt for every image, and round-trips.
fn training_spec(bytes: &[u8]) {
    let Ok(spec) = serde_json::from_slice::<TrainingSpec>(bytes) else {
        return;
    };
    let text = serde_json::to_string(&spec).expect("a spec is JSON");
    assert!(serde_json::from_str(&text).is_ok_and(|again| same(&spec, &again)));
    if spec.check(6).is_err() {
        return;
    }
    assert!(spec.learning_rate > 0.0 && spec.steps > 0);
    assert_eq!(spec.start_candidates().len(), spec.text_tokens as usize);
    let (before, after) = spec.reference_prompt(0);
    assert!(!before.is_empty() && !after.is_empty());
    assert!(spec.preview_prompt().contains(&format!("<{}>", spec.name)));
}

/// The pieces of a prompt reconstruct it, and every named concept is found in it.
fn prompt(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (text, class) = text.split_once('\0').unwrap_or((text, "cat"));
    if let Ok(pieces) = parse_prompt(text) {
        let joined: String = pieces
            .iter()
            .map(|piece| match piece {
                PromptPiece::Text(text) => (*text).to_owned(),
                PromptPiece::Concept(name) => format!("<{name}>"),
            })
            .collect();
        assert_eq!(joined, text);
        assert!(concept_names(&pieces).into_iter().all(is_slug));
    }
    coar::service::fuzzing::placement(text, class);
}

/// An accepted address is not internal, and parses to itself.
fn webhook_address(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let policy = AddressPolicy { allow_private: false };
    let Ok(url) = policy.check(text) else { return };
    assert!(matches!(url.scheme(), "http" | "https"));
    assert!(url.username().is_empty() && url.password().is_none());
    assert!(url.as_str().bytes().all(|byte| byte.is_ascii_graphic()), "{url:?}");
    let host = url.host_str().expect("an accepted address has a host");
    if let Ok(address) = host.trim_matches(['[', ']']).parse() {
        assert!(policy.allows(address), "{url}");
    }
    if url.as_str().len() <= 2048 {
        assert_eq!(policy.check(url.as_str()).as_ref(), Ok(&url));
    }
}

/// Frames between processes, and server events for the command line: the same however the bytes are split.
fn frames(bytes: &[u8]) {
    let Some((&first, rest)) = bytes.split_first() else {
        return;
    };
    match first % 3 {
        0 => coar::cluster::fuzzing::frames(rest),
        1 => coar::cluster::fuzzing::messages(rest),
        _ => coar::client::fuzzing::events(rest),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fuzzers' corpus: interesting inputs and every input that has ever failed; and the seeds.
    #[test]
    fn corpus_is_parsed_or_rejected() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
        for target in TARGETS {
            let mut fed = 0;
            for entry in std::fs::read_dir(corpus.join(target.name)).unwrap() {
                (target.run)(&std::fs::read(entry.unwrap().path()).unwrap());
                fed += 1;
            }
            for seed in seeds(target.name) {
                (target.run)(&seed);
            }
            assert!(fed > 0, "{} has no inputs", target.name);
        }
    }

    /// A corpus input with a few bytes changed, removed, duplicated, or taken from another.
    fn changed(kept: &[Vec<u8>], rng: &mut impl rand::Rng) -> Vec<u8> {
        let pick = |rng: &mut dyn rand::RngCore, length: usize| (rng.next_u64() % length.max(1) as u64) as usize;
        let mut bytes = kept[pick(rng, kept.len())].clone();
        for _ in 0..=pick(rng, 8) {
            let at = pick(rng, bytes.len());
            match pick(rng, 6) {
                0 => bytes.truncate(at),
                1 if !bytes.is_empty() => bytes[at] ^= 1 << pick(rng, 8),
                2 if !bytes.is_empty() => bytes[at] = [0, 0x7f, 0x80, 0xff, b'0', b'{', b'<', b'"'][pick(rng, 8)],
                3 => bytes.insert(at, pick(rng, 256) as u8),
                4 => {
                    let end = (at + pick(rng, 64)).min(bytes.len());
                    let piece = bytes[at..end].to_vec();
                    bytes.splice(at..at, piece);
                }
                _ => {
                    let other = &kept[pick(rng, kept.len())];
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[pick(rng, other.len()).min(other.len())..]);
                }
            }
        }
        bytes
    }

    /// A short run without a fuzzer; COAR_FUZZ_SEED selects another one. Failing inputs are printed as hex.
    #[test]
    fn mutated_inputs_are_parsed_or_rejected() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
        let seed = std::env::var("COAR_FUZZ_SEED").map_or(0, |seed| seed.parse().unwrap());
        for target in TARGETS {
            let mut rng: rand_chacha::ChaCha8Rng = rand::SeedableRng::seed_from_u64(seed);
            let mut kept: Vec<Vec<u8>> = std::fs::read_dir(corpus.join(target.name))
                .unwrap()
                .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
                .collect();
            kept.sort();
            for _ in 0..500 {
                let bytes = changed(&kept, &mut rng);
                let outcome = std::panic::catch_unwind(|| (target.run)(&bytes));
                assert!(outcome.is_ok(), "{}: {}", target.name, hex::encode(&bytes));
            }
        }
    }

    /// Some seeds must be accepted, otherwise the targets only test rejections.
    #[test]
    fn seeds_are_accepted() {
        let first = |name| seeds(name).into_iter().next().unwrap();
        assert!(coar_core::image::decode(&first("picture"), &Default::default()).is_ok());
        assert!(ConceptFile::from_bytes(&first("concept_file")).is_ok());
        assert!(in_file(&first("pickle"), |file| pickle::read(file, "state_dict")).is_ok());
        assert!(in_file(&first("model_config"), ModelConfig::read).is_ok());
        assert!(in_file(&first("vqgan_config"), VqganConfig::read).is_ok());
        assert!(in_file(&first("settings"), coar::config::read_file).is_ok());
        for seed in seeds("judge_config") {
            let kind = seed[0] % 4;
            assert!(in_file(&seed[1..], |file| judges::config(kind, file)), "{kind}");
        }
        let text = String::from_utf8(first("clip_tokenizer")).unwrap();
        let (vocab, merges) = text.split_once('\0').unwrap();
        assert!(judges::tokenizer(vocab, merges));
        assert!(TextTokenizer::from_bytes(&first("tokenizer")).is_ok());
        assert!(index_of(std::str::from_utf8(&first("checkpoint_index")).unwrap()).is_ok());
        assert!(
            serde_json::from_slice::<TrainingSpec>(&first("training_spec")).is_ok_and(|spec| spec.check(6).is_ok())
        );
    }
}
