//! PyTorch checkpoints (`torch.save`) read without executing any code of the pickle.
//!
//! Two containers: a zip file with one entry per storage, and the one from before PyTorch 1.6, where storages follow
//! five pickles. Only tensors of the requested dictionary are materialised.

mod machine;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use safetensors::tensor::Dtype;
use tch::Tensor;

use super::checkpoint::kind_of;
use super::{Target, TensorSource};
use crate::model::ModelError;
use machine::{Machine, NamedTensor, StorageRef, TensorRef, Value};

/// A tensor's numbers, contiguous, little-endian.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    pub dtype: Dtype,
    pub shape: Vec<i64>,
    pub bytes: Vec<u8>,
}

/// Maximum pickle size; the real file's is 40 KB.
const PICKLE_LIMIT: u64 = 64 << 20;
/// Magic number of the old container.
const LEGACY_MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

fn size_of(dtype: Dtype) -> usize {
    dtype.bitsize() / 8
}

/// Tensors of the dictionary `key` (such as `state_dict`) in a checkpoint; if there is no such key, of the
/// checkpoint itself. Entries that are not tensors are skipped.
///
/// # Errors
/// When the file is not a checkpoint, is truncated, contains a view outside its storage, or needs a global to be
/// executed to build one of the requested entries; the error names it.
pub fn read(file: &Path, key: &str) -> Result<BTreeMap<String, HostTensor>, ModelError> {
    let fault = |problem: String| ModelError::file(file, problem);
    let mut handle = File::open(file).map_err(|error| fault(error.to_string()))?;
    let mut magic = [0u8; 4];
    handle
        .read_exact(&mut magic)
        .map_err(|_| fault("is too short to be a checkpoint".to_owned()))?;
    handle
        .seek(SeekFrom::Start(0))
        .map_err(|error| fault(error.to_string()))?;
    if magic == *b"PK\x03\x04" {
        read_zip(handle, key)
    } else {
        read_legacy(handle, key)
    }
    .map_err(fault)
}

fn read_zip(handle: File, key: &str) -> Result<BTreeMap<String, HostTensor>, String> {
    let file_bytes = handle.metadata().map_err(|error| error.to_string())?.len();
    let bomb = file_bytes.saturating_mul(MAX_EXPANSION);
    let mut archive = zip::ZipArchive::new(handle).map_err(|error| format!("is not a complete zip file: {error}"))?;
    let name = archive
        .file_names()
        .find(|name| name.ends_with("/data.pkl") && name.matches('/').count() == 1)
        .map(str::to_owned)
        .ok_or("holds no data.pkl: not a checkpoint of torch.save")?;
    let prefix = name.trim_end_matches("data.pkl").to_owned();
    let mut entry = |name: &str, limit: u64| -> Result<Vec<u8>, String> {
        let entry = archive
            .by_name(name)
            .map_err(|error| format!("lacks `{name}`: {error}"))?;
        let limit = limit.min(bomb);
        if entry.size() > limit {
            return Err(format!("`{name}` has {} bytes, the limit is {limit}", entry.size()));
        }
        let mut bytes = Vec::new();
        entry
            .take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| format!("`{name}` is broken: {error}"))?;
        match bytes.len() as u64 > limit {
            true => Err(format!("`{name}` is larger than it says")),
            false => Ok(bytes),
        }
    };
    if entry(&format!("{prefix}byteorder"), 16).is_ok_and(|order| order != b"little") {
        return Err("was written on a big-endian machine, which is not supported".to_owned());
    }
    let pickle = entry(&name, PICKLE_LIMIT)?;
    let (machine, root) = Machine::run(&mut Cursor::new(pickle.as_slice()))?;
    drop(pickle);
    materialise(&machine.tensors(root, key)?, file_bytes, |storage, gather| {
        let needed = bytes_of(storage)?;
        gather(&entry(&format!("{prefix}data/{}", storage.key), needed)?)
    })
}

fn bytes_of(storage: &StorageRef) -> Result<u64, String> {
    let numel = u64::try_from(storage.numel).ok();
    numel
        .and_then(|numel| numel.checked_mul(size_of(storage.dtype) as u64))
        .ok_or_else(|| format!("claims {} numbers in the storage `{}`", storage.numel, storage.key))
}

fn read_legacy(file: File, key: &str) -> Result<BTreeMap<String, HostTensor>, String> {
    // SAFETY: the map is only read, and weights are not changed while they are loaded.
    let bytes = unsafe { memmap2::Mmap::map(&file) }.map_err(|error| error.to_string())?;
    let mut input = Cursor::new(&bytes[..]);
    let (machine, magic) = Machine::run(&mut input)?;
    if machine.long(magic) != Some(&LEGACY_MAGIC[..]) {
        return Err("is neither a zip file nor a checkpoint from before PyTorch 1.6".to_owned());
    }
    Machine::run(&mut input)?;
    let (writer, facts) = Machine::run(&mut input)?;
    if writer.entry(facts, "little_endian") == Some(Value::Bool(false)) {
        return Err("was written on a big-endian machine, which is not supported".to_owned());
    }
    let (machine, root) = Machine::run(&mut input)?;
    let (keys_machine, keys) = Machine::run(&mut input)?;
    let mut described: HashMap<&str, &StorageRef> = HashMap::new();
    for storage in machine.storages() {
        let same = *described.entry(&storage.key).or_insert(storage);
        if same != storage {
            return Err(format!("describes the storage `{}` in two ways", storage.key));
        }
    }
    let mut storages: HashMap<Rc<str>, &[u8]> = HashMap::new();
    for key in keys_machine.strings(keys).ok_or("holds no list of storages")? {
        let storage = described
            .remove(&*key)
            .ok_or_else(|| format!("lists the storage `{key}`, which cannot be read"))?;
        let mut count = [0u8; 8];
        input
            .read_exact(&mut count)
            .map_err(|_| format!("is truncated before the storage `{key}`"))?;
        let (count, wanted) = (i64::from_le_bytes(count), storage.numel);
        if count != wanted {
            return Err(format!(
                "has {count} numbers in the storage `{key}`, which is described as {wanted}"
            ));
        }
        let from = input.position() as usize;
        let data = usize::try_from(bytes_of(storage)?)
            .ok()
            .and_then(|length| bytes.get(from..from.checked_add(length)?))
            .ok_or_else(|| format!("is truncated inside the storage `{key}`"))?;
        input.set_position((from + data.len()) as u64);
        storages.insert(key, data);
    }
    materialise(&machine.tensors(root, key)?, bytes.len() as u64, |storage, gather| {
        gather(
            storages
                .get(&storage.key)
                .ok_or_else(|| format!("lacks the storage `{}`", storage.key))?,
        )
    })
}

/// All tensors together may take at most this many times the file size: views that share a storage are copied out
/// one by one, and entries may be deflated, but a small file must not exhaust memory.
const MAX_EXPANSION: u64 = 64;

/// Called with a storage's bytes while they are in memory.
type Gather<'a> = dyn FnMut(&[u8]) -> Result<(), String> + 'a;

/// Copies every tensor out of its storage; each storage is read once and dropped before the next.
fn materialise(
    tensors: &[NamedTensor],
    file_bytes: u64,
    mut with_storage: impl FnMut(&StorageRef, &mut Gather) -> Result<(), String>,
) -> Result<BTreeMap<String, HostTensor>, String> {
    let limit = file_bytes.saturating_mul(MAX_EXPANSION);
    let mut total = 0u64;
    let mut by_storage: BTreeMap<&str, Vec<(&str, &TensorRef)>> = BTreeMap::new();
    for (name, tensor) in tensors {
        let count = tensor
            .shape
            .iter()
            .try_fold(1u64, |count, &n| count.checked_mul(u64::try_from(n).ok()?));
        let bytes = count.and_then(|count| count.checked_mul(size_of(tensor.storage.dtype) as u64));
        total = bytes
            .and_then(|bytes| total.checked_add(bytes))
            .filter(|&total| total <= limit)
            .ok_or_else(|| {
                format!(
                    "tensor `{name}` {:?}: the tensors are more than {MAX_EXPANSION} times the file",
                    tensor.shape
                )
            })?;
        by_storage.entry(&tensor.storage.key).or_default().push((name, tensor));
    }
    let mut out = BTreeMap::new();
    for views in by_storage.into_values() {
        let largest = views
            .iter()
            .map(|(_, tensor)| &tensor.storage)
            .max_by_key(|storage| storage.numel);
        let Some(storage) = largest else { continue };
        with_storage(storage, &mut |bytes| {
            for (name, tensor) in &views {
                let gathered = gather(tensor, bytes).map_err(|problem| format!("tensor `{name}` {problem}"))?;
                let (dtype, shape) = (tensor.storage.dtype, tensor.shape.clone());
                out.insert(
                    (*name).to_owned(),
                    HostTensor {
                        dtype,
                        shape,
                        bytes: gathered,
                    },
                );
            }
            Ok(())
        })?;
    }
    Ok(out)
}

/// Copies a strided view out of its storage.
fn gather(tensor: &TensorRef, storage: &[u8]) -> Result<Vec<u8>, String> {
    let size = size_of(tensor.storage.dtype);
    let available = storage.len() / size;
    let outside = || format!("reaches outside its storage of {available} numbers");
    let mut count = 1usize;
    let mut last = usize::try_from(tensor.offset).map_err(|_| outside())?;
    if tensor.shape.len() != tensor.strides.len() {
        return Err("has different numbers of strides and dimensions".to_owned());
    }
    for (&n, &stride) in tensor.shape.iter().zip(&tensor.strides) {
        let (n, stride) = (
            usize::try_from(n).map_err(|_| outside())?,
            usize::try_from(stride).map_err(|_| outside())?,
        );
        count = count.checked_mul(n).ok_or_else(outside)?;
        let reach = n.saturating_sub(1).checked_mul(stride).ok_or_else(outside)?;
        last = last.checked_add(reach).ok_or_else(outside)?;
    }
    if count == 0 {
        return Ok(Vec::new());
    }
    if last >= available || count > available {
        return Err(outside());
    }
    if is_contiguous(tensor) {
        let from = tensor.offset as usize * size;
        return Ok(storage[from..from + count * size].to_vec());
    }
    let mut bytes = Vec::with_capacity(count * size);
    let mut index = vec![0i64; tensor.shape.len()];
    for _ in 0..count {
        let steps: i64 = index.iter().zip(&tensor.strides).map(|(i, stride)| i * stride).sum();
        let from = (tensor.offset + steps) as usize * size;
        bytes.extend_from_slice(&storage[from..from + size]);
        for dim in (0..index.len()).rev() {
            index[dim] += 1;
            if index[dim] < tensor.shape[dim] {
                break;
            }
            index[dim] = 0;
        }
    }
    Ok(bytes)
}

/// Whether a view inside its storage is contiguous.
fn is_contiguous(tensor: &TensorRef) -> bool {
    let mut expected = 1;
    tensor.shape.iter().zip(&tensor.strides).rev().all(|(&n, &stride)| {
        let fits = n == 1 || stride == expected;
        expected *= n;
        fits
    })
}

/// A checkpoint's `state_dict` as a source of parameters.
#[derive(Debug)]
pub struct PickleSource {
    file: PathBuf,
    tensors: BTreeMap<String, HostTensor>,
    target: Target,
}

impl PickleSource {
    /// Reads all tensors of the file's `state_dict`; unused keys (`loss.*`) are harmless.
    ///
    /// # Errors
    /// As [`read`].
    pub fn open(file: &Path, target: Target) -> Result<Self, ModelError> {
        Ok(Self {
            file: file.to_owned(),
            tensors: read(file, "state_dict")?,
            target,
        })
    }
}

impl TensorSource for PickleSource {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let fault = |problem: String| ModelError::Tensor {
            file: self.file.clone(),
            tensor: name.to_owned(),
            problem,
        };
        let tensor = self.tensors.get(name).ok_or_else(|| fault("is missing".to_owned()))?;
        if tensor.shape != shape {
            return Err(fault(format!("has shape {:?}; expected {shape:?}", tensor.shape)));
        }
        if !matches!(tensor.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(fault(format!("is {:?}; expected floating-point numbers", tensor.dtype)));
        }
        let kind =
            kind_of(tensor.dtype).ok_or_else(|| fault(format!("is {:?}, which cannot be read", tensor.dtype)))?;
        let host = Tensor::f_from_data_size(&tensor.bytes, shape, kind)?;
        Ok(host.f_to_device(self.target.device)?.f_to_kind(self.target.kind)?)
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.tensors.get(name).map(|tensor| tensor.shape.clone())
    }
}

#[cfg(test)]
mod tests;
