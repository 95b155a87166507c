//! Small well-formed inputs for each target: the initial corpus.

use std::io::{Cursor, Write as _};
use std::path::Path;

use coar_core::concept::{ConceptFile, ConceptHeader, ConceptKind, ConceptTensors};
use coar_core::image::{OutputFormat, RgbImage, encode};
use coar_core::training::spec::{Preset, TrainingSpec};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Well-formed inputs of a target, the simplest first.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    let texts = |texts: &[&str]| texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    match target {
        "picture" | "picture_header" => pictures(),
        "concept_file" => vec![concept_file()],
        "checkpoint" => vec![concept_file(), file("tests/golden/pickle/expected.safetensors")],
        "checkpoint_index" => texts(&[
            r#"{"metadata": {"total_size": 8}, "weight_map": {"a.weight": "model-1.safetensors", "b": "model-2.safetensors"}}"#,
        ]),
        "pickle" => ["zip_plain", "legacy", "zip_lightning", "zip_protocol4"]
            .iter()
            .map(|name| file(&format!("tests/golden/pickle/{name}.ckpt")))
            .collect(),
        "tokenizer" => texts(&[TOKENIZER]),
        "model_config" => texts(&[MODEL]),
        "vqgan_config" => vec![file("assets/pocket/vqgan.yaml")],
        "judge_config" => judge_configs(),
        "clip_tokenizer" => texts(&[CLIP]),
        "settings" => texts(&[
            "listen = \"127.0.0.1:0\"\nrows = 4\ntraining_share = 0.25\nmetrics_open = true\ncors_origin = [\"https://a.example\"]\n",
        ]),
        "training_spec" => [ConceptKind::Subject, ConceptKind::Style]
            .into_iter()
            .map(|kind| serde_json::to_vec(&spec(kind)).expect("a spec is JSON"))
            .collect(),
        "prompt" => texts(&[
            "a photo of <rex> cat, 1 < 2, in <ink> style.",
            "A dog and a dog\0dog",
            " \n\0teddy bear",
        ]),
        "archive" => vec![archive()],
        "form" => vec![form()],
        "json_body" => texts(&[
            r#"{"prompt": "a <rex> cat", "n": 2.0, "size": "256x256", "seed": 7, "guidance_scale": 3.5, "top_k": 200, "output_format": "webp", "output_compression": 80, "partial_images": 1, "concepts": ["ink"], "identity_mask": false, "metadata": {"a": "b"}, "webhook_url": "https://example.com/"}"#,
            r#"{"quotas": {"pictures": 5}, "description": null, "concepts": null, "background": "auto"}"#,
        ]),
        "head" => texts(&[
            "order-1\nwait=5, respond-async\ntext/event-stream\napplication/json; charset=utf-8\nlimit=3&after=concept_01990000000070008000000000000000\nimage_01990000000070008000000000000000.png\n1767225600\n00ff",
        ]),
        "webhook_address" => texts(&[
            "https://example.com/hook?x=1",
            "http://2130706433/",
            "http://0x7f.1./",
            "http://[::ffff:10.0.0.1]:80/",
            "https://user:word@ex\u{e4}mple.com/\u{fc}%0d%0a#@",
        ]),
        "frames" => frames(),
        other => unreachable!("`{other}` is no target"),
    }
}

fn file(path: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn pictures() -> Vec<Vec<u8>> {
    let picture = RgbImage {
        width: 9,
        height: 6,
        rgb: (0..9 * 6 * 3).map(|at| (at * 37 % 256) as u8).collect(),
    };
    [
        OutputFormat::Png,
        OutputFormat::Jpeg(80),
        OutputFormat::WebP,
        OutputFormat::LossyWebP(50),
    ]
    .into_iter()
    .flat_map(|format| [&[][..], &[("prompt", "a <rex> cat".to_owned())]].map(|text| encode(&picture, format, text)))
    .map(|file| file.expect("a picture in memory can be written"))
    .collect()
}

fn spec(kind: ConceptKind) -> TrainingSpec {
    let class = (kind == ConceptKind::Subject).then_some("cat");
    TrainingSpec {
        captions: vec!["on the beach".to_owned()],
        ..TrainingSpec::preset(Preset::Paper, kind, "rex", class, 2)
    }
}

fn concept_file() -> Vec<u8> {
    let file = ConceptFile {
        header: ConceptHeader {
            kind: ConceptKind::Subject,
            name: "rex".to_owned(),
            class_noun: Some("cat".to_owned()),
            method: Default::default(),
            spec: spec(ConceptKind::Subject),
            losses: serde_json::Map::from_iter([("next_token".to_owned(), 1.5.into())]),
            base_model: "abc".to_owned(),
        },
        tensors: ConceptTensors {
            layers: 2,
            hidden: 2,
            text_tokens: 1,
            image_tokens: 1,
            text: vec![0.5; 4],
            image: vec![-2.0; 4],
        },
    };
    file.to_bytes().expect("the tensors have their sizes")
}

fn judge_configs() -> Vec<Vec<u8>> {
    let files = [
        "dino/config.json",
        "clip/config.json",
        "dino/preprocessor_config.json",
        "clip/preprocessor_config.json",
    ];
    let seed = |(kind, name): (u8, &str)| {
        let text = String::from_utf8(file(&format!("tests/judges/tiny/{name}"))).expect("JSON is UTF-8");
        // DINO's other size: the target preprocesses for only one.
        let text = match kind {
            2 => text.replace("\"size\": 28", "\"size\": 24"),
            _ => text,
        };
        [&[kind], text.as_bytes()].concat()
    };
    (0..).zip(files).map(seed).collect()
}

/// A deflated file, a stored one in a folder, and a comment.
fn archive() -> Vec<u8> {
    let mut writer = ZipWriter::new(Cursor::new(Vec::new()));
    writer.set_comment("of two files");
    for (name, method, bytes) in [
        ("a.png", CompressionMethod::Deflated, [7; 300].as_slice()),
        ("b/a.txt", CompressionMethod::Stored, b"on the beach"),
    ] {
        let options = SimpleFileOptions::default()
            .compression_method(method)
            .last_modified_time(zip::DateTime::default());
        writer.start_file(name, options).expect("a name of its own");
        writer.write_all(bytes).expect("memory takes what is written");
    }
    writer.finish().expect("memory takes what is written").into_inner()
}

fn form() -> Vec<u8> {
    let part =
        |name: &str, value: &str| format!("--x\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
    let picture = "--x\r\nContent-Disposition: form-data; name=\"images\"; filename=\"a.png\"\r\nContent-Type: image/png\r\n\r\nPNG\r\n";
    let form = [
        "\u{7}",
        &part("name", "rex"),
        &part("kind", "subject"),
        &part("class", "cat"),
        &part("captions[]", "on the beach"),
        &part("steps", "60"),
        &part("learning_rate", "1e-3"),
        &part("metadata", "{\"a\": \"b\"}"),
        picture,
        "--x--\r\n",
    ];
    form.concat().into_bytes()
}

fn frames() -> Vec<Vec<u8>> {
    let frame = |head: &str, body: &[u8]| {
        let lengths = [(head.len() as u32).to_be_bytes(), (body.len() as u32).to_be_bytes()].concat();
        [&lengths, head.as_bytes(), body].concat()
    };
    let sent = [
        frame(r#"{"event":"started"}"#, &[]),
        frame(r#"{"event":"alive"}"#, &[]),
        frame(r#"{"event":"progress","done":1,"total":2}"#, &[]),
        frame(r#"{"event":"picture","index":0,"width":1,"height":1}"#, &[1, 2, 3]),
        frame(r#"{"event":"failed","message":"no"}"#, &[]),
    ];
    let refusal = r#"{"kind":"invalid","code":"prompt_too_long","message":"is long","field":"prompt","limit":7,"retry_after":null}"#;
    vec![
        [&[0][..], &sent.concat()].concat(),
        [&[1], refusal.as_bytes()].concat(),
        b"\x02: hello\n\nevent: progress\ndata: {\"done\": 1}\r\n\r\ndata: a\rdata:b\n\nid: 7\n".to_vec(),
    ]
}

/// A minimal byte-pair tokenizer for `tokenizers`, with the names that a vocabulary needs.
const TOKENIZER: &str = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"Sequence","pretokenizers":[{"type":"Split","pattern":{"Regex":"\\w+|[^\\w\\s]+"},"behavior":"Isolated","invert":false},{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":false}]},"post_processor":null,"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,"use_regex":true},"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,"vocab":{"<s>":0,"<pad>":1,"<eoss>":2,"<racm3:break>":3,"<reserved08706>":4,"<reserved08799>":5,"<reserved08801>":6,"IMGIMGAZ":7,"IMGIMGBZ":8,"a":9,"c":10,"t":11,"at":12},"merges":["a t"]}}"#;

/// A minimal CLIP tokenizer, in its two files.
const CLIP: &str = "{\"<|startoftext|>\": 0, \"<|endoftext|>\": 1, \"a\": 2, \"d\": 3, \"o</w>\": 4, \"g</w>\": 5, \"o\": 6, \"og</w>\": 7, \
\"dog</w>\": 8, \"a</w>\": 9, \"\u{c3}\": 10}\0#version: 0.2\no g</w>\nd og</w>\n";

/// A minimal configuration.
const MODEL: &str = r#"{"model_type":"chameleon","architectures":["ChameleonXLLMXForConditionalGeneration"],"vocab_size":100,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":2,"num_attention_heads":2,"num_key_value_heads":1,"rope_theta":10000.0,"hidden_act":"silu","vocabulary_map":{"<s>":0},"target_size":64,"concept_preset":"pocket"}"#;
