//! Fuzz targets: what a server sends to the command line.

use std::collections::VecDeque;

use super::sse::Parser;

/// Parsing does not depend on how the bytes are split.
pub fn events(bytes: &[u8]) {
    let read = |pieces: &[&[u8]]| {
        let (mut parser, mut events) = (Parser::default(), VecDeque::new());
        for piece in pieces {
            parser
                .feed(piece, &mut events)
                .expect("a short stream has no large event");
        }
        events
    };
    let whole = read(&[bytes]);
    for cut in [1, bytes.len() / 2, bytes.len()] {
        let (left, right) = bytes.split_at(cut.min(bytes.len()));
        assert_eq!(read(&[left, right]), whole);
    }
    for event in whole {
        let _ = event.json();
    }
}
