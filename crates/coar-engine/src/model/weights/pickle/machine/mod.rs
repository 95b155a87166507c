//! A pickle machine restricted to data: it builds lists, dictionaries and descriptions of tensors. All other calls
//! in a pickle become opaque values that record the function's name.

mod torch;

use std::io::{BufRead, Read};
use std::rc::Rc;

pub(super) use torch::{NamedTensor, StorageRef, TensorRef};

/// Maximum number of operations, and so of values, of one pickle; the real file has 20 thousand.
const OPERATION_LIMIT: usize = 2_000_000;
/// Maximum number of bytes copied from one value into another: a few operations can request the same long list or
/// name repeatedly.
const COPY_LIMIT: usize = 32 << 20;
/// Maximum length of the name of a function or class.
const NAME_LIMIT: usize = 4096;

/// A value: small, and copied freely; compound values are indices into the machine's objects, so nothing recurses.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    Float,
    Object(usize),
}

#[derive(Debug)]
enum Object {
    Text(Rc<str>),
    /// Integers beyond i64, as written.
    Long(Vec<u8>),
    Bytes,
    Tuple(Vec<Value>),
    List(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Global(Rc<str>),
    Storage(Rc<StorageRef>),
    Tensor(Rc<TensorRef>),
    /// The result of calling an unknown function. Names are shared: a small pickle can call one function millions of
    /// times.
    Opaque(Rc<str>),
}

pub(super) struct Machine {
    objects: Vec<Object>,
    stack: Vec<Value>,
    marks: Vec<usize>,
    memo: std::collections::HashMap<u64, Value>,
    /// Bytes copied between values so far.
    copied: usize,
}

type Fault = String;

fn bytes<const N: usize>(input: &mut impl Read) -> Result<[u8; N], Fault> {
    let mut buffer = [0u8; N];
    input
        .read_exact(&mut buffer)
        .map_err(|_| "the pickle is truncated".to_owned())?;
    Ok(buffer)
}

fn run_of(input: &mut impl BufRead, length: u64) -> Result<Vec<u8>, Fault> {
    let mut buffer = Vec::new();
    let read = input
        .take(length)
        .read_to_end(&mut buffer)
        .map_err(|error| error.to_string())?;
    if read as u64 == length {
        Ok(buffer)
    } else {
        Err("the pickle is truncated".to_owned())
    }
}

fn line(input: &mut impl BufRead) -> Result<String, Fault> {
    let mut buffer = Vec::new();
    input
        .take(NAME_LIMIT as u64)
        .read_until(b'\n', &mut buffer)
        .map_err(|error| error.to_string())?;
    match buffer.pop() {
        Some(b'\n') => String::from_utf8(buffer).map_err(|_| "a name in the pickle is not UTF-8".to_owned()),
        _ => Err("the pickle is truncated or a name in it is too long".to_owned()),
    }
}

impl Machine {
    /// Runs one pickle up to its STOP and advances the input past it.
    pub(super) fn run(input: &mut impl BufRead) -> Result<(Self, Value), Fault> {
        let mut machine = Self {
            objects: vec![],
            stack: vec![],
            marks: vec![],
            memo: Default::default(),
            copied: 0,
        };
        for _ in 0..OPERATION_LIMIT {
            let [operation] = bytes::<1>(input)?;
            if operation == b'.' {
                let root = machine.pop()?;
                return Ok((machine, root));
            }
            machine.operate(operation, input)?;
        }
        Err(format!("the pickle has more than {OPERATION_LIMIT} operations"))
    }

    fn operate(&mut self, operation: u8, input: &mut impl BufRead) -> Result<(), Fault> {
        match operation {
            0x80 => {
                let [protocol] = bytes(input)?;
                if protocol > 5 {
                    return Err(format!("the pickle has protocol {protocol}, which is unknown"));
                }
            }
            0x95 => drop(bytes::<8>(input)?),
            b'N' => self.stack.push(Value::None),
            0x88 | 0x89 => self.stack.push(Value::Bool(operation == 0x88)),
            b'K' => {
                let [n] = bytes(input)?;
                self.stack.push(Value::Int(n.into()));
            }
            b'M' => self.stack.push(Value::Int(u16::from_le_bytes(bytes(input)?).into())),
            b'J' => self.stack.push(Value::Int(i32::from_le_bytes(bytes(input)?).into())),
            0x8a => {
                let [length] = bytes(input)?;
                let digits = run_of(input, length.into())?;
                self.push_long(digits);
            }
            0x8b => {
                let length = u32::from_le_bytes(bytes(input)?);
                let digits = run_of(input, length.into())?;
                self.push_long(digits);
            }
            b'G' => {
                bytes::<8>(input)?;
                self.stack.push(Value::Float);
            }
            b'X' => {
                let length = u32::from_le_bytes(bytes(input)?);
                self.text(run_of(input, length.into())?)?;
            }
            0x8c => {
                let [length] = bytes(input)?;
                self.text(run_of(input, length.into())?)?;
            }
            0x8d => {
                let length = u64::from_le_bytes(bytes(input)?);
                self.text(run_of(input, length)?)?;
            }
            // Python 2 strings, as in the oldest checkpoints.
            b'U' => {
                let [length] = bytes(input)?;
                let text = run_of(input, length.into())?;
                self.old_text(text);
            }
            b'T' => {
                let length = u32::from_le_bytes(bytes(input)?);
                let text = run_of(input, length.into())?;
                self.old_text(text);
            }
            b'C' => {
                let [length] = bytes(input)?;
                run_of(input, length.into())?;
                self.push(Object::Bytes);
            }
            b'B' => {
                let length = u32::from_le_bytes(bytes(input)?);
                run_of(input, length.into())?;
                self.push(Object::Bytes);
            }
            0x8e | 0x96 => {
                let length = u64::from_le_bytes(bytes(input)?);
                run_of(input, length)?;
                self.push(Object::Bytes);
            }
            b'(' => self.marks.push(self.stack.len()),
            b')' => self.push(Object::Tuple(vec![])),
            0x85..=0x87 => {
                let items = self.take(usize::from(operation - 0x84))?;
                self.push(Object::Tuple(items));
            }
            b't' => {
                let items = self.take_to_mark()?;
                self.push(Object::Tuple(items));
            }
            b']' | 0x8f => self.push(Object::List(vec![])),
            // Sets and frozen sets are never needed.
            b'l' | 0x91 => {
                let items = self.take_to_mark()?;
                self.push(Object::List(items));
            }
            b'}' => self.push(Object::Dict(vec![])),
            b'd' => {
                let items = self.take_to_mark()?;
                self.push(Object::Dict(vec![]));
                self.extend_dict(items)?;
            }
            b'a' => {
                let item = self.pop()?;
                self.extend_list(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.take_to_mark()?;
                self.extend_list(items)?;
            }
            b's' => {
                let items = self.take(2)?;
                self.extend_dict(items)?;
            }
            b'u' => {
                let items = self.take_to_mark()?;
                self.extend_dict(items)?;
            }
            b'q' => {
                let [index] = bytes(input)?;
                self.memoize(index.into())?;
            }
            b'r' => {
                let index = u32::from_le_bytes(bytes(input)?);
                self.memoize(index.into())?;
            }
            0x94 => self.memoize(self.memo.len() as u64)?,
            b'h' => {
                let [index] = bytes(input)?;
                self.recall(index.into())?;
            }
            b'j' => {
                let index = u32::from_le_bytes(bytes(input)?);
                self.recall(index.into())?;
            }
            b'0' => drop(self.pop()?),
            b'1' => drop(self.take_to_mark()?),
            b'2' => {
                let top = self.pop()?;
                self.stack.extend([top, top]);
            }
            b'c' => {
                let (module, name) = (line(input)?, line(input)?);
                self.push(Object::Global(format!("{module}.{name}").into()));
            }
            0x93 => {
                let parts = self.take(2)?;
                let (module, name) = (self.as_text(parts[0])?, self.as_text(parts[1])?);
                let length = module.len() + 1 + name.len();
                if length > NAME_LIMIT {
                    return Err("a name in the pickle is too long".to_owned());
                }
                let name = format!("{module}.{name}");
                self.copy(length)?;
                self.push(Object::Global(name.into()));
            }
            // Old-style classes: constructed by a call like any other.
            b'i' => {
                let name = format!("{}.{}", line(input)?, line(input)?);
                self.take_to_mark()?;
                self.push(Object::Opaque(name.into()));
            }
            b'o' => {
                let parts = self.take_to_mark()?;
                let class = *parts.first().ok_or("the pickle builds an object without a class")?;
                self.push(Object::Opaque(self.callable(class)?));
            }
            b'Q' => {
                let id = self.pop()?;
                let storage = self.persistent(id)?;
                self.push(storage);
            }
            b'R' | 0x81 => {
                let parts = self.take(2)?;
                let result = self.call(parts[0], parts[1])?;
                self.stack.push(result);
            }
            0x92 => {
                let parts = self.take(3)?;
                let result = self.call(parts[0], parts[1])?;
                self.stack.push(result);
            }
            // State for the object below it on the stack; no known object has state.
            b'b' => drop(self.pop()?),
            other => {
                return Err(format!(
                    "the pickle has the operation {other:#04x}, which checkpoints do not use"
                ));
            }
        }
        Ok(())
    }

    /// Counts bytes that are copied from one value into another.
    fn copy(&mut self, bytes: usize) -> Result<(), Fault> {
        self.copied = self.copied.saturating_add(bytes);
        if self.copied > COPY_LIMIT {
            return Err(format!("the pickle copies more than {COPY_LIMIT} bytes of itself"));
        }
        Ok(())
    }

    fn push(&mut self, object: Object) {
        self.stack.push(Value::Object(self.objects.len()));
        self.objects.push(object);
    }

    fn text(&mut self, bytes: Vec<u8>) -> Result<(), Fault> {
        let text = String::from_utf8(bytes).map_err(|_| "a text in the pickle is not UTF-8".to_owned())?;
        self.push(Object::Text(text.into()));
        Ok(())
    }

    fn old_text(&mut self, bytes: Vec<u8>) {
        self.push(String::from_utf8(bytes).map_or(Object::Bytes, |text| Object::Text(text.into())));
    }

    fn push_long(&mut self, digits: Vec<u8>) {
        if digits.len() > 8 {
            return self.push(Object::Long(digits));
        }
        let negative = digits.last().is_some_and(|byte| byte & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; 8];
        wide[..digits.len()].copy_from_slice(&digits);
        self.stack.push(Value::Int(i64::from_le_bytes(wide)));
    }

    fn pop(&mut self) -> Result<Value, Fault> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the pickle pops more values than it has pushed".to_owned());
        }
        self.stack.pop().ok_or_else(|| "the pickle is empty".to_owned())
    }

    fn take(&mut self, count: usize) -> Result<Vec<Value>, Fault> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>, _>>()?;
        items.reverse();
        Ok(items)
    }

    fn take_to_mark(&mut self) -> Result<Vec<Value>, Fault> {
        let mark = self.marks.pop().ok_or("the pickle has no mark where it needs one")?;
        Ok(self.stack.split_off(mark.min(self.stack.len())))
    }

    fn memoize(&mut self, index: u64) -> Result<(), Fault> {
        let top = *self.stack.last().ok_or("the pickle memoizes from an empty stack")?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u64) -> Result<(), Fault> {
        let value = *self
            .memo
            .get(&index)
            .ok_or("the pickle reads a memo entry that was never stored")?;
        self.stack.push(value);
        Ok(())
    }

    fn below(&mut self) -> Result<&mut Object, Fault> {
        match self.stack.last() {
            Some(&Value::Object(index)) => Ok(&mut self.objects[index]),
            _ => Err("the pickle fills an object that is not a container".to_owned()),
        }
    }

    fn extend_list(&mut self, items: Vec<Value>) -> Result<(), Fault> {
        match self.below()? {
            Object::List(list) => list.extend(items),
            Object::Opaque(_) => {}
            _ => return Err("the pickle appends to an object that is not a list".to_owned()),
        }
        Ok(())
    }

    fn extend_dict(&mut self, items: Vec<Value>) -> Result<(), Fault> {
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("the pickle sets a key without a value".to_owned());
        }
        match self.below()? {
            Object::Dict(dict) => dict.extend(pairs.iter().map(|&[key, value]| (key, value))),
            Object::Opaque(_) => {}
            _ => return Err("the pickle sets keys of an object that is not a dictionary".to_owned()),
        }
        Ok(())
    }

    fn object(&self, value: Value) -> Option<&Object> {
        match value {
            Value::Object(index) => self.objects.get(index),
            _ => None,
        }
    }

    fn as_text(&self, value: Value) -> Result<&Rc<str>, Fault> {
        match self.object(value) {
            Some(Object::Text(text)) => Ok(text),
            _ => Err("the pickle has another type where a string is expected".to_owned()),
        }
    }

    fn callable(&self, function: Value) -> Result<Rc<str>, Fault> {
        match self.object(function) {
            Some(Object::Global(name) | Object::Opaque(name)) => Ok(name.clone()),
            _ => Err("the pickle calls an object that is not a function".to_owned()),
        }
    }

    /// The dictionary's value for a string key.
    pub(super) fn entry(&self, dict: Value, key: &str) -> Option<Value> {
        match self.object(dict) {
            Some(Object::Dict(items)) => items
                .iter()
                .rev()
                .find(|(name, _)| self.as_text(*name).is_ok_and(|name| &**name == key))
                .map(|item| item.1),
            _ => None,
        }
    }

    /// An integer too long for i64, as written.
    pub(super) fn long(&self, value: Value) -> Option<&[u8]> {
        match self.object(value) {
            Some(Object::Long(digits)) => Some(digits),
            _ => None,
        }
    }

    /// A list of texts.
    pub(super) fn strings(&self, value: Value) -> Option<Vec<Rc<str>>> {
        match self.object(value) {
            Some(Object::List(items)) => items.iter().map(|&item| self.as_text(item).ok().cloned()).collect(),
            _ => None,
        }
    }
}
