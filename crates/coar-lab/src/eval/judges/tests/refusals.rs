//! Invalid judges: each error names the file, and the field or tensor.

use serde_json::json;

use super::{Copy, tiny};

#[test]
fn fields_outside_their_limits_are_named() {
    let huge = json!(i64::MAX);
    for (pointer, value, expected) in [
        ("/model_type", json!("bert"), "`model_type` is \"bert\"; expected `vit`"),
        ("/model_type", json!(null), "`model_type` is missing"),
        (
            "/hidden_size",
            huge.clone(),
            "`hidden_size` is 9223372036854775807; expected 1 to 4096",
        ),
        ("/hidden_size", json!(-1), "`hidden_size` is -1"),
        ("/hidden_size", json!("24"), "`hidden_size` is \"24\""),
        ("/hidden_size", json!(1e300), "`hidden_size` is 1e+300"),
        (
            "/num_attention_heads",
            json!(5),
            "`num_attention_heads` is 5; expected a divisor of hidden_size, 24",
        ),
        ("/num_hidden_layers", json!(0), "`num_hidden_layers` is 0"),
        ("/num_hidden_layers", json!(3), "tensor `encoder.layer.2."),
        ("/intermediate_size", huge.clone(), "`intermediate_size`"),
        ("/intermediate_size", json!(41), "has shape [40, 24]; expected [41, 24]"),
        (
            "/patch_size",
            json!(5),
            "`patch_size` is 5; expected a divisor of image_size, 28",
        ),
        (
            "/patch_size",
            json!([7, 14]),
            "`patch_size` is [7,14]; expected a square",
        ),
        (
            "/image_size",
            huge.clone(),
            "`image_size` is 9223372036854775807; expected 1 to 1024",
        ),
        (
            "/image_size",
            json!(35),
            "results in images of 28; the network takes 35 x 35",
        ),
        ("/num_channels", json!(1), "`num_channels` is 1; expected 3 to 3"),
        (
            "/hidden_act",
            json!("swish"),
            "`hidden_act` is \"swish\"; expected `gelu` or `quick_gelu`",
        ),
        ("/layer_norm_eps", json!(0), "`layer_norm_eps` is 0"),
        ("/qkv_bias", json!(1), "`qkv_bias` is 1; expected true or false"),
    ] {
        let copy = Copy::of("dino");
        copy.set("config.json", pointer, value);
        let error = copy.dino().unwrap_err().to_string();
        assert!(error.contains(expected), "{pointer}: {error}");
        assert!(
            error.contains("config.json") || error.contains("model.safetensors"),
            "{error}"
        );
    }
    for (pointer, value, expected) in [
        ("/do_resize", json!(false), "`do_resize` is false"),
        ("/size", json!(-3), "`size` is -3"),
        ("/size", json!({"height": 28}), "`size.width` is missing"),
        (
            "/size",
            json!({"height": 28, "width": 29}),
            "`size.width` is 29; expected a square",
        ),
        (
            "/size",
            json!({"shortest_edge": 28}),
            "`size` is a shortest edge without do_center_crop",
        ),
        ("/size", json!([1, 2, 3, 4, 5]), "`size` is a list of 5"),
        ("/resample", json!(1), "`resample` is 1; expected 2 (bilinear)"),
        ("/image_std", json!([1, 0, 1]), "`image_std` is [1,0,1]"),
        (
            "/image_mean",
            json!([1, 2]),
            "`image_mean` is [1,2]; expected three numbers",
        ),
        ("/do_center_crop", json!(true), "`crop_size` results in images of 224"),
        ("/rescale_factor", json!("x"), "`rescale_factor` is \"x\""),
    ] {
        let copy = Copy::of("dino");
        copy.set("preprocessor_config.json", pointer, value);
        let error = copy.dino().unwrap_err().to_string();
        assert!(
            error.contains(expected) && error.contains("preprocessor_config.json"),
            "{error}"
        );
    }
    for (pointer, value, expected) in [
        ("/projection_dim", huge.clone(), "`projection_dim`"),
        ("/text_config", json!(7), "`text_config` is 7; expected an object"),
        (
            "/text_config/vocab_size",
            huge,
            "`text_config.vocab_size` is 9223372036854775807",
        ),
        ("/text_config/vocab_size", json!(559), "config.json's vocab_size is 559"),
        (
            "/text_config/eos_token_id",
            json!(560),
            "`text_config.eos_token_id` is 560",
        ),
        ("/text_config/eos_token_id", json!(5), "config.json's eos_token_id is 5"),
        (
            "/text_config/max_position_embeddings",
            json!(2),
            "`text_config.max_position_embeddings` is 2",
        ),
        (
            "/vision_config/hidden_size",
            json!(21),
            "`vision_config.num_attention_heads` is 5",
        ),
        ("/vision_config/patch_size", json!(0), "`vision_config.patch_size` is 0"),
    ] {
        let copy = Copy::of("clip");
        copy.set("config.json", pointer, value);
        let error = copy.clip().unwrap_err().to_string();
        assert!(error.contains(expected), "{pointer}: {error}");
    }
}

#[test]
fn missing_and_damaged_files_are_named() {
    let fault = |clip: &Copy| clip.clip().unwrap_err().to_string();
    for (file, expected) in [
        ("config.json", "config.json: "),
        ("preprocessor_config.json", "preprocessor_config.json: "),
        ("vocab.json", "holds neither tokenizer.json nor vocab.json"),
        ("merges.txt", "merges.txt: "),
        (
            "model.safetensors",
            "holds neither model.safetensors nor pytorch_model.bin",
        ),
    ] {
        let copy = Copy::of("clip");
        std::fs::remove_file(copy.path(file)).unwrap();
        assert!(fault(&copy).contains(expected), "{}", fault(&copy));
    }
    for (file, text, expected) in [
        ("config.json", "[]", "config.json: is not a JSON object"),
        (
            "preprocessor_config.json",
            "{\"size\": 1",
            "preprocessor_config.json: is not a JSON object",
        ),
        (
            "vocab.json",
            "{\"a\": -1}",
            "vocab.json: is not an object of names and ids",
        ),
        ("vocab.json", "{}", "merges.txt: line 2: "),
        (
            "merges.txt",
            "#version: 0.2\na b c\n",
            "merges.txt: line 2: is `a b c`; expected two pieces",
        ),
        ("merges.txt", "a\n", "merges.txt: line 1: is `a`"),
        (
            "merges.txt",
            "a \u{1f600}\n",
            "merges.txt: line 1: `\u{1f600}` is not in vocab.json",
        ),
        ("tokenizer.json", "{}", "tokenizer.json: `tokenizer` cannot be read"),
    ] {
        let copy = Copy::of("clip");
        std::fs::write(copy.path(file), text).unwrap();
        assert!(fault(&copy).contains(expected), "{file}: {}", fault(&copy));
    }
    // Without an end token there is no position for the embedding.
    let copy = Copy::of("clip");
    let mut names = copy.read("vocab.json");
    names.as_object_mut().unwrap().remove("<|endoftext|>");
    std::fs::write(copy.path("vocab.json"), names.to_string()).unwrap();
    let error = fault(&copy);
    assert!(
        error.contains("vocab.json") && error.contains("<|endoftext|>"),
        "{error}"
    );
    for (name, file) in [("dino", "model.safetensors"), ("dino_pickle", "pytorch_model.bin")] {
        let whole = std::fs::read(tiny().join(name).join(file)).unwrap();
        for part in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
            let copy = Copy::of(name);
            std::fs::write(copy.path(file), &whole[..part]).unwrap();
            let error = copy.dino().unwrap_err().to_string();
            assert!(error.contains(file), "{part}: {error}");
        }
    }
}
