//! The meaning of PyTorch's own functions and storages in a pickle: descriptions of tensors, and dictionaries.

use std::rc::Rc;

use safetensors::tensor::Dtype;

use super::{Fault, Machine, Object, Value};

/// A storage by its key.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::model::weights::pickle) struct StorageRef {
    pub key: Rc<str>,
    pub dtype: Dtype,
    pub numel: i64,
}

/// A view into a storage, in numbers.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::model::weights::pickle) struct TensorRef {
    pub storage: Rc<StorageRef>,
    pub offset: i64,
    pub shape: Vec<i64>,
    pub strides: Vec<i64>,
}

/// A tensor with its name in a dictionary.
pub(in crate::model::weights::pickle) type NamedTensor = (Rc<str>, Rc<TensorRef>);

/// libtorch's own limit of dimensions.
const MAX_DIMENSIONS: usize = 64;

fn storage_dtype(global: &str) -> Option<Dtype> {
    Some(match global {
        "torch.DoubleStorage" => Dtype::F64,
        "torch.FloatStorage" => Dtype::F32,
        "torch.HalfStorage" => Dtype::F16,
        "torch.BFloat16Storage" => Dtype::BF16,
        "torch.LongStorage" => Dtype::I64,
        "torch.IntStorage" => Dtype::I32,
        "torch.ShortStorage" => Dtype::I16,
        "torch.CharStorage" => Dtype::I8,
        "torch.ByteStorage" => Dtype::U8,
        "torch.BoolStorage" => Dtype::BOOL,
        _ => return None,
    })
}

impl Machine {
    /// `("storage", class, key, location, numel[, view])`. Storages of unknown classes become opaque: they matter
    /// only if a requested tensor is in one.
    pub(super) fn persistent(&self, id: Value) -> Result<Object, Fault> {
        let Some(Object::Tuple(parts)) = self.object(id) else {
            return Err("a storage is not described by a tuple".to_owned());
        };
        let [kind, class, key, _, numel, ref view @ ..] = parts[..] else {
            return Err("a storage's description is too short".to_owned());
        };
        if &**self.as_text(kind)? != "storage" {
            return Err("the pickle has a persistent id that is not a storage".to_owned());
        }
        let class = self.callable(class)?;
        let Some(dtype) = storage_dtype(&class) else {
            return Ok(Object::Opaque(class));
        };
        if view.iter().any(|view| *view != Value::None) {
            return Err(
                "a storage is a view of another one, which only the very first versions of PyTorch wrote".to_owned(),
            );
        }
        match numel {
            Value::Int(numel) if numel >= 0 => Ok(Object::Storage(Rc::new(StorageRef {
                key: self.as_text(key)?.clone(),
                dtype,
                numel,
            }))),
            _ => Err("a storage has no size".to_owned()),
        }
    }

    pub(super) fn call(&mut self, function: Value, arguments: Value) -> Result<Value, Fault> {
        let name = self.callable(function)?;
        let Some(Object::Tuple(arguments)) = self.object(arguments) else {
            return Err(format!("the pickle calls {name} without a tuple of arguments"));
        };
        let parts = arguments.iter().take(4).filter_map(|part| match self.object(*part) {
            Some(Object::Tuple(items) | Object::List(items)) => Some(items.len()),
            _ => None,
        });
        let copied = parts.sum::<usize>() * 2 * size_of::<Value>();
        let object = match (&*name, &arguments[..]) {
            ("collections.OrderedDict", []) => Object::Dict(vec![]),
            ("collections.OrderedDict", &[pairs]) => Object::Dict(self.pairs(pairs)?),
            (
                "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor",
                &[storage, Value::Int(offset), shape, strides, ..],
            ) => match self.object(storage) {
                Some(Object::Storage(storage)) => Object::Tensor(Rc::new(TensorRef {
                    storage: storage.clone(),
                    offset,
                    shape: self.ints(shape)?,
                    strides: self.ints(strides)?,
                })),
                Some(Object::Opaque(class)) => Object::Opaque(class.clone()),
                _ => return Err("a tensor has no storage".to_owned()),
            },
            ("torch._utils._rebuild_parameter", &[data, ..]) => return Ok(data),
            _ => Object::Opaque(name),
        };
        self.copy(copied)?;
        self.push(object);
        self.pop()
    }

    /// The list of key and value pairs that Python 2 passes to `OrderedDict`.
    fn pairs(&self, list: Value) -> Result<Vec<(Value, Value)>, Fault> {
        let Some(Object::List(items)) = self.object(list) else {
            return Err("the pickle builds a dictionary from an object that is not a list".to_owned());
        };
        items
            .iter()
            .map(|&item| match self.object(item) {
                Some(Object::List(pair) | Object::Tuple(pair)) if pair.len() == 2 => Ok((pair[0], pair[1])),
                _ => Err("the pickle builds a dictionary from an object that is not a pair".to_owned()),
            })
            .collect()
    }

    fn ints(&self, value: Value) -> Result<Vec<i64>, Fault> {
        let items = match self.object(value) {
            Some(Object::Tuple(items) | Object::List(items)) => items,
            _ => return Err("a tensor's shape is not a tuple".to_owned()),
        };
        if items.len() > MAX_DIMENSIONS {
            return Err(format!(
                "a tensor has {} dimensions, the limit is {MAX_DIMENSIONS}",
                items.len()
            ));
        }
        items
            .iter()
            .map(|item| match item {
                Value::Int(n) => Ok(*n),
                _ => Err("a tensor's shape contains non-integers".to_owned()),
            })
            .collect()
    }

    /// Every storage that was referenced.
    pub(in crate::model::weights::pickle) fn storages(&self) -> impl Iterator<Item = &StorageRef> {
        self.objects.iter().filter_map(|object| match object {
            Object::Storage(storage) => Some(&**storage),
            _ => None,
        })
    }

    /// Tensors of the dictionary under `key`, or of the root if there is no such key.
    pub(in crate::model::weights::pickle) fn tensors(&self, root: Value, key: &str) -> Result<Vec<NamedTensor>, Fault> {
        let dict = |value| match self.object(value) {
            Some(Object::Dict(items)) => Ok(items),
            Some(Object::Opaque(name)) => Err(format!("is built by calling {name}, which is never executed")),
            _ => Err("is not a dictionary".to_owned()),
        };
        let root_value = root;
        let root = dict(root).map_err(|problem| format!("the checkpoint {problem}"))?;
        let entries = match self.entry(root_value, key) {
            Some(value) => dict(value).map_err(|problem| format!("`{key}` {problem}"))?,
            None => root,
        };
        let mut tensors = Vec::new();
        for &(name, value) in entries {
            let Ok(name) = self.as_text(name) else { continue };
            match self.object(value) {
                Some(Object::Tensor(tensor)) => tensors.push((name.clone(), tensor.clone())),
                Some(Object::Opaque(call)) => {
                    return Err(format!("`{name}` is built by calling {call}, which is never executed"));
                }
                _ => {}
            }
        }
        Ok(tensors)
    }
}
