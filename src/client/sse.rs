//! Server-sent events as in the HTML standard: lines of `field: value`; an empty line ends an event.

use std::collections::VecDeque;

use reqwest::Response;
use serde_json::Value;

use super::ClientError;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Event {
    /// `message` if the server sends none.
    pub name: String,
    pub data: String,
}

impl Event {
    /// The data as JSON.
    ///
    /// # Errors
    /// When it is not JSON.
    pub fn json(&self) -> Result<Value, ClientError> {
        serde_json::from_str(&self.data)
            .map_err(|error| ClientError::Answer(format!("the event `{}` is not JSON: {error}", self.name)))
    }
}

/// The largest event that is accepted: the largest that the server sends contains one image.
const EVENT_LIMIT: usize = 256 << 20;

/// Parses events from bytes, which may be split anywhere.
#[derive(Debug, Default)]
pub(super) struct Parser {
    /// Bytes of an incomplete line.
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed that follows belongs to it.
    after_return: bool,
    name: String,
    data: Option<String>,
    begun: bool,
}

impl Parser {
    pub(super) fn feed(&mut self, bytes: &[u8], events: &mut VecDeque<Event>) -> Result<(), ClientError> {
        for piece in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            let (rest, end) = match piece.split_last() {
                Some((end @ (b'\n' | b'\r'), rest)) => (rest, Some(*end)),
                _ => (piece, None),
            };
            let pair = self.after_return && end == Some(b'\n') && rest.is_empty();
            self.after_return = end == Some(b'\r');
            if pair {
                continue;
            }
            self.line.extend_from_slice(rest);
            if self.line.len() + self.data.as_ref().map_or(0, String::len) > EVENT_LIMIT {
                return Err(ClientError::Answer(format!(
                    "an event is larger than {EVENT_LIMIT} bytes"
                )));
            }
            if end.is_some() {
                let line = std::mem::take(&mut self.line);
                events.extend(self.line(&String::from_utf8_lossy(&line)));
            }
        }
        Ok(())
    }

    /// Parses a whole line; returns an event at the empty line that ends it.
    fn line(&mut self, line: &str) -> Option<Event> {
        let line = match std::mem::replace(&mut self.begun, true) {
            // A byte order mark may precede the first line.
            false => line.trim_start_matches('\u{feff}'),
            true => line,
        };
        if line.is_empty() {
            let name = std::mem::take(&mut self.name);
            return self.data.take().map(|data| Event {
                name: if name.is_empty() { "message".to_owned() } else { name },
                data,
            });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.name = value.to_owned(),
            "data" => match &mut self.data {
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            // Comments, which keep the connection alive, `id`, `retry`, and fields of newer servers.
            _ => {}
        }
        None
    }
}

/// A stream of events.
#[derive(Debug)]
pub struct Events {
    answer: Response,
    parser: Parser,
    ready: VecDeque<Event>,
}

impl Events {
    pub(super) fn new(answer: Response) -> Self {
        Self {
            answer,
            parser: Parser::default(),
            ready: VecDeque::new(),
        }
    }

    /// The next event, `None` after the last. An `error` event is an error.
    ///
    /// # Errors
    /// When the connection breaks, or the server reports a failure.
    pub async fn next(&mut self) -> Result<Option<Event>, ClientError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return match event.name.as_str() {
                    "error" => Err(ClientError::of_envelope(&event.json()?["error"], 0)),
                    _ => Ok(Some(event)),
                };
            }
            match self.answer.chunk().await.map_err(|error| ClientError::broken(&error))? {
                Some(bytes) => self.parser.feed(&bytes, &mut self.ready)?,
                None => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(chunks: &[&[u8]]) -> Vec<(String, String)> {
        let (mut parser, mut events) = (Parser::default(), VecDeque::new());
        for chunk in chunks {
            parser.feed(chunk, &mut events).unwrap();
        }
        events.into_iter().map(|event| (event.name, event.data)).collect()
    }

    fn event(name: &str, data: &str) -> (String, String) {
        (name.to_owned(), data.to_owned())
    }

    #[test]
    fn names_data_and_comments() {
        let text = b": hello\n\nevent: progress\ndata: {\"done\": 1}\n\ndata: a\ndata:b\ndata\nid: 7\nretry: 10\n\nevent: lost\n\n";
        assert_eq!(
            parse(&[text]),
            [event("progress", "{\"done\": 1}"), event("message", "a\nb\n")]
        );
        // An event without its empty line has not ended.
        assert_eq!(parse(&[b"data: a\n"]), []);
    }

    #[test]
    fn any_cut_and_any_line_end_reads_the_same() {
        let text = "\u{feff}event: tick\ndata: gr\u{fc}n\ndata: two\n\ndata: x\n\n";
        let wanted = [event("tick", "gr\u{fc}n\ntwo"), event("message", "x")];
        for end in ["\n", "\r", "\r\n"] {
            let bytes = text.replace('\n', end).into_bytes();
            assert_eq!(parse(&[&bytes]), wanted, "{end:?}");
            for cut in 0..=bytes.len() {
                assert_eq!(parse(&[&bytes[..cut], &bytes[cut..]]), wanted, "{end:?} at {cut}");
            }
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(parse(&single), wanted, "{end:?}");
        }
    }
}
