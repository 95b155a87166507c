//! Safetensors files on disk, memory-mapped: one file, or the shards of a Hugging Face checkpoint folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::{Advice, Mmap};
use safetensors::tensor::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use super::{Target, TensorSource};
use crate::model::ModelError;

#[derive(Debug)]
struct Shard {
    file: PathBuf,
    map: Mmap,
    /// Offset of the data behind the header.
    data: usize,
}

#[derive(Debug, Clone)]
struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<i64>,
    from: usize,
    to: usize,
}

/// An opened checkpoint; tensors are copied out of the map one at a time, in the target's kind and onto its device.
#[derive(Debug)]
pub struct Checkpoint {
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
    target: Target,
    root: PathBuf,
}

/// The libtorch kind of a safetensors dtype; `None` for kinds that libtorch lacks.
pub(super) fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

fn open_shard(file: &Path) -> Result<(Shard, Vec<(String, Dtype, Vec<usize>, usize, usize)>), ModelError> {
    let handle = File::open(file).map_err(|error| ModelError::file(file, error))?;
    // SAFETY: the map is only read. Whoever truncates a checkpoint under a running server breaks that server; checkpoints
    // are written once and then left alone.
    let map = unsafe { Mmap::map(&handle) }.map_err(|error| ModelError::file(file, error))?;
    let length = map.len();
    let (header, metadata) = SafeTensors::read_metadata(&map)
        .map_err(|error| ModelError::file(file, format!("not a complete safetensors file: {error}")))?;
    let data = header + 8;
    let entries: Vec<_> = metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| (name, info.dtype, info.shape.clone(), info.data_offsets.0, info.data_offsets.1))
        .collect();
    let needed = data + entries.iter().map(|entry| entry.4).max().unwrap_or(0);
    if length < needed {
        return Err(ModelError::file(file, format!("is truncated: {length} bytes, its header describes {needed}")));
    }
    Ok((Shard { file: file.to_owned(), map, data }, entries))
}

impl Checkpoint {
    /// Opens `model.safetensors.index.json` with its shards, or a single `model.safetensors`.
    ///
    /// # Errors
    /// When neither is there, a shard is missing or truncated, or the index names a tensor that its shard lacks.
    pub fn open_dir(dir: &Path, target: Target) -> Result<Self, ModelError> {
        let index = dir.join("model.safetensors.index.json");
        if !index.exists() {
            let single = dir.join("model.safetensors");
            if !single.exists() {
                return Err(ModelError::file(dir, "holds neither model.safetensors.index.json nor model.safetensors"));
            }
            return Self::open_file(&single, target);
        }
        let text = std::fs::read_to_string(&index).map_err(|error| ModelError::file(&index, error))?;
        let parsed: serde_json::Value = serde_json::from_str(&text).map_err(|error| ModelError::file(&index, error))?;
        let weight_map = parsed
            .get("weight_map")
            .and_then(serde_json::Value::as_object)
            .ok_or_else(|| ModelError::file(&index, "lacks `weight_map`"))?;
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in weight_map {
            let shard = shard.as_str().filter(|name| !name.contains(['/', '\\'])).ok_or_else(|| {
                ModelError::file(&index, format!("gives no plain file name for `{tensor}`"))
            })?;
            by_shard.entry(shard).or_default().push(tensor);
        }
        let mut checkpoint = Self { shards: vec![], entries: BTreeMap::new(), target, root: dir.to_owned() };
        for (shard, tensors) in by_shard {
            let file = dir.join(shard);
            if !file.exists() {
                return Err(ModelError::file(&file, format!("is missing; the index says that it holds {} tensors", tensors.len())));
            }
            checkpoint.add(&file)?;
            for tensor in tensors {
                if !checkpoint.entries.contains_key(tensor) {
                    return Err(ModelError::Tensor {
                        file,
                        tensor: tensor.to_owned(),
                        problem: "is missing; the index says that it is here".to_owned(),
                    });
                }
            }
        }
        Ok(checkpoint)
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// When it is missing, truncated or not a safetensors file.
    pub fn open_file(file: &Path, target: Target) -> Result<Self, ModelError> {
        let mut checkpoint = Self { shards: vec![], entries: BTreeMap::new(), target, root: file.to_owned() };
        checkpoint.add(file)?;
        Ok(checkpoint)
    }

    fn add(&mut self, file: &Path) -> Result<(), ModelError> {
        let (shard, entries) = open_shard(file)?;
        let index = self.shards.len();
        self.shards.push(shard);
        for (name, dtype, shape, from, to) in entries {
            let shape = shape.into_iter().map(|n| n as i64).collect();
            self.entries.insert(name, Entry { shard: index, dtype, shape, from, to });
        }
        Ok(())
    }

    /// Names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The dtype of a tensor on disk.
    pub fn dtype_of(&self, name: &str) -> Option<Dtype> {
        self.entries.get(name).map(|entry| entry.dtype)
    }

    /// Bytes of all tensors on disk.
    pub fn bytes(&self) -> u64 {
        self.entries.values().map(|entry| (entry.to - entry.from) as u64).sum()
    }

    /// Numbers in all tensors.
    pub fn parameters(&self) -> u64 {
        self.entries.values().map(|entry| entry.shape.iter().product::<i64>() as u64).sum()
    }

    /// A name for these weights: SHA-256 over names, shapes, dtypes and the first 4 KiB of every tensor, in hex. Concepts
    /// carry it, since they only fit the model that they were trained on.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        for (name, entry) in &self.entries {
            let bytes = self.slice(entry);
            hash.update(name.as_bytes());
            hash.update(format!("{:?}{:?}", entry.dtype, entry.shape).as_bytes());
            hash.update(&bytes[..bytes.len().min(4096)]);
        }
        hex::encode(hash.finalize())
    }

    fn slice(&self, entry: &Entry) -> &[u8] {
        let shard = &self.shards[entry.shard];
        &shard.map[shard.data + entry.from..shard.data + entry.to]
    }

    /// Any tensor as it is on disk, copied, on the CPU.
    ///
    /// # Errors
    /// When it is absent or libtorch has no such kind.
    pub fn raw(&self, name: &str) -> Result<Tensor, ModelError> {
        let entry = self.entry(name)?;
        self.copy(name, entry, None)
    }

    fn entry(&self, name: &str) -> Result<&Entry, ModelError> {
        self.entries.get(name).ok_or_else(|| ModelError::Tensor {
            file: self.root.clone(),
            tensor: name.to_owned(),
            problem: "is missing".to_owned(),
        })
    }

    fn copy(&self, name: &str, entry: &Entry, target: Option<Target>) -> Result<Tensor, ModelError> {
        let shard = &self.shards[entry.shard];
        let fault = |problem: String| ModelError::Tensor { file: shard.file.clone(), tensor: name.to_owned(), problem };
        let kind = kind_of(entry.dtype).ok_or_else(|| fault(format!("is {:?}, which cannot be read", entry.dtype)))?;
        let bytes = self.slice(entry);
        let strides: Vec<i64> = (0..entry.shape.len()).map(|dim| entry.shape[dim + 1..].iter().product()).collect();
        // Where the kind or device changes the view is read straight from the map and no second copy of it exists; the
        // copy is forced where both stay, so that no tensor refers to the map.
        // SAFETY: the header's check guarantees that the slice holds exactly the shape's numbers; the view is dropped
        // before the map.
        let view = unsafe { Tensor::f_from_blob(bytes.as_ptr(), &entry.shape, &strides, kind, Device::Cpu)? };
        let copied = match target {
            Some(target) if target.kind != kind || target.device != Device::Cpu => {
                view.f_to_device_(target.device, target.kind, false, true)?
            }
            _ => view.f_detach_copy()?,
        };
        // The pages were read once; keeping them would double the memory in use.
        let page = 4096;
        let from = (shard.data + entry.from).next_multiple_of(page);
        let to = (shard.data + entry.to) / page * page;
        if to > from {
            // SAFETY: dropping clean pages of a read-only file map changes nothing but residency.
            let _ = unsafe { shard.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, from, to - from) };
        }
        let _ = shard.map.advise(Advice::Normal);
        Ok(copied)
    }
}

impl TensorSource for Checkpoint {
    fn tensor(&self, name: &str, shape: &[i64]) -> Result<Tensor, ModelError> {
        let entry = self.entry(name)?;
        if entry.shape != shape {
            return Err(ModelError::Tensor {
                file: self.shards[entry.shard].file.clone(),
                tensor: name.to_owned(),
                problem: format!("has shape {:?}; expected {shape:?}", entry.shape),
            });
        }
        if !matches!(entry.dtype, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16) {
            return Err(ModelError::Tensor {
                file: self.shards[entry.shard].file.clone(),
                tensor: name.to_owned(),
                problem: format!("is {:?}; expected floating-point numbers", entry.dtype),
            });
        }
        self.copy(name, entry, Some(self.target))
    }

    fn shape_of(&self, name: &str) -> Option<Vec<i64>> {
        self.entries.get(name).map(|entry| entry.shape.clone())
    }
}
