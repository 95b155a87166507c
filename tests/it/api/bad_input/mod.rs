//! Every bad input is refused with a 4xx and a stable code, and leaves nothing behind.

mod concepts;
mod generations;
mod text;

use reqwest::multipart::Form;

use crate::support::{REX, images};

fn form(fields: &[(&'static str, &'static str)]) -> Form {
    let base = [("name", "rex"), ("kind", "subject"), ("class", "cat")];
    let kept = base
        .iter()
        .filter(|(key, _)| !fields.iter().any(|(other, _)| other == key));
    kept.chain(fields.iter().filter(|(_, value)| *value != "-"))
        .fold(Form::new(), |form, (key, value)| form.text(*key, *value))
}

fn png() -> Vec<u8> {
    images(&REX, 1).remove(0)
}
