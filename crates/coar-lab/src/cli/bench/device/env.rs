//! The environment: driver, libraries, memory, processor; and whether the device works.

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::report::Findings;
use super::setup::Bench;
use crate::cli::bench::megabytes;
use coar_engine::device::{free_bytes, used_bytes};
use coar_engine::model::accelerator;
use coar_engine::model::cpu::multiplies_bf16;

/// The libtorch release that this program is linked against; its build rejects any other.
pub(super) const LIBTORCH: &str = "2.11.0";

/// Environment variables that select the device or affect how libraries compute.
const VARIABLES: [&str; 8] = [
    "CUDA_VISIBLE_DEVICES",
    "CUDA_LAUNCH_BLOCKING",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "TORCH_CUDNN_SDPA_DEPRIORITIZED",
    "CUBLAS_WORKSPACE_CONFIG",
    "GOMP_SPINCOUNT",
    "OMP_NUM_THREADS",
];
/// Libraries whose versions (in the file names) are reported.
const LIBRARIES: [&str; 8] = [
    "libtorch_cpu",
    "libtorch_cuda",
    "libcuda.",
    "libcudart",
    "libcudnn.",
    "libcublas.",
    "libnvrtc.",
    "libgomp",
];

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    if let Some(list) = bench.nvidia_smi(
        "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit,mig.mode.current,compute_mode",
    ) {
        findings.figure("nvidia_smi", list);
    }
    findings.figure("variables", variables());
    match accelerator::load_cuda() {
        Ok(()) => findings.figure("loader", "libtorch_cuda.so is loaded"),
        Err(error) => findings.figure("loader", error),
    }
    findings.figure("cuda_devices", tch::Cuda::device_count());
    findings.figure("libraries", loaded_libraries());
    findings.figure("processor", processor());
    findings.figure(
        "cores",
        std::thread::available_parallelism().map_or(0, |cores| cores.get() as u64),
    );
    findings.figure("libtorch_threads", i64::from(tch::get_num_threads()));
    findings.figure("multiplies_bf16", multiplies_bf16());
    findings.figure("host_memory_free_mb", megabytes(free_bytes(Device::Cpu)));
    if let Some(reason) = bench.absent() {
        findings.headline(reason.to_owned());
        anyhow::bail!("{reason}");
    }
    let device = bench.device();
    if bench.on_cuda() {
        findings.figure("cudnn", tch::utils::version_cudnn());
        findings.figure("cuda_runtime", tch::utils::version_cudart());
        findings.figure("device_memory_free_mb", megabytes(free_bytes(device)));
        findings.figure("device_memory_used_mb", megabytes(used_bytes(device)));
    }
    accelerator::probe(device)?;
    // The sum of 0 to 4095, computed on the device.
    let sum = Tensor::f_arange(4096, (Kind::Float, device))?
        .f_sum(Kind::Double)?
        .f_double_value(&[])?;
    findings.check("a sum on the device, difference", (sum - 8_386_560.0).abs(), 0.0);
    if bench.on_cuda() {
        // Measured after the context is created.
        findings.figure("device_memory_used_with_context_mb", megabytes(used_bytes(device)));
    }
    findings.headline(match bench.on_cuda() {
        true => format!("driver {}, cuDNN {}", bench.driver(), tch::utils::version_cudnn()),
        false => processor(),
    });
    Ok(())
}

fn variables() -> Value {
    let set = VARIABLES
        .iter()
        .filter_map(|&name| Some((name.to_owned(), std::env::var(name).ok()?.into())));
    Value::Object(set.collect::<Map<_, _>>())
}

/// File names of the libraries mapped into the process.
fn loaded_libraries() -> Value {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut files: Vec<&str> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5)?.rsplit('/').next())
        .filter(|name| LIBRARIES.iter().any(|library| name.starts_with(library)))
        .collect();
    files.sort_unstable();
    files.dedup();
    json!(files)
}

/// The processor's name as reported by the system.
pub(super) fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name"));
    let name = name.map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned());
    name.unwrap_or_else(|| "a processor without a name".to_owned())
}
