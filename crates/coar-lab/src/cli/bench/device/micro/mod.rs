//! Single operations at the model's real shapes: the limits of the device's memory, launches and kernels, which
//! bound a decode step.

mod kernels;
mod products;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::report::Findings;
use super::setup::Bench;
use super::workload::{median, timed};
use coar_engine::model::{ModelConfig, accelerator};

/// Shared state of the measurements.
struct Micro<'a> {
    findings: &'a Findings,
    device: Device,
    /// bf16 on an accelerator, f32 on the CPU.
    kind: Kind,
    config: ModelConfig,
    /// Number of runs; the median is reported.
    runs: usize,
    small: bool,
    /// The precision of f32 products, convolutions excluded.
    tf32: bool,
}

pub(super) fn run(bench: &Bench, findings: &Findings) -> anyhow::Result<()> {
    let micro = Micro {
        findings,
        device: bench.device(),
        kind: bench.kind()?,
        config: bench.configs()?.0,
        runs: if bench.small { 3 } else { 15 },
        small: bench.small,
        tf32: bench.tf32(),
    };
    micro.memory()?;
    micro.launches()?;
    micro.uploads()?;
    micro.products()?;
    micro.attention()?;
    micro.narrow_weights()?;
    micro.convolutions()?;
    micro.selection()?;
    let read = findings.number("read_gb_per_second");
    findings.headline(format!(
        "reads {read:.0} GB/s, {:.1} us a launch",
        findings.number("launch_host_us")
    ));
    Ok(())
}

impl Micro<'_> {
    fn random(&self, shape: &[i64]) -> anyhow::Result<Tensor> {
        Ok(Tensor::f_randn(shape, (self.kind, self.device))?)
    }

    /// Milliseconds of the device, the median of several runs.
    fn ms<T>(&self, work: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<f64> {
        Ok(1e3 * median(self.device, self.runs, work)?)
    }

    /// Adds a row to a table; if the device or release lacks an operation, the row has its error.
    fn row(&self, table: &str, mut row: Value, measured: anyhow::Result<Value>) -> anyhow::Result<()> {
        self.findings.in_time()?;
        let more = measured.unwrap_or_else(|error| {
            let text = format!("{error:#}");
            json!({"error": text.lines().next().unwrap_or("").chars().take(160).collect::<String>()})
        });
        if let (Value::Object(row), Value::Object(more)) = (&mut row, more) {
            row.extend(more);
        }
        self.findings.row(table, row);
        Ok(())
    }

    /// Bytes per second of a copy (read and written) and of a sum (read).
    fn memory(&self) -> anyhow::Result<()> {
        let numbers = if self.small { 1 << 22 } else { 1 << 30 };
        let from = Tensor::f_ones([numbers], (Kind::Float, self.device))?;
        let mut to = from.f_empty_like()?;
        let bytes = 4.0 * numbers as f64;
        let copy = self.ms(|| Ok(to.f_copy_(&from)?))?;
        let read = self.ms(|| {
            let _ = from.f_sum(Kind::Float)?;
            Ok(())
        })?;
        self.findings.figure("copy_gb_per_second", 2.0 * bytes / copy / 1e6);
        self.findings.figure("read_gb_per_second", bytes / read / 1e6);
        Ok(())
    }

    /// The cost of launching an almost empty kernel: on the host, and on the device.
    fn launches(&self) -> anyhow::Result<()> {
        let count = if self.small { 500 } else { 5000 };
        let mut number = Tensor::f_zeros([64], (Kind::Float, self.device))?;
        let mut work = || {
            for _ in 0..count {
                let _ = number.f_add_scalar_(1.0)?;
            }
            Ok(())
        };
        timed(self.device, &mut work)?;
        let spent = timed(self.device, &mut work)?;
        let us = |seconds: f64| 1e6 * seconds / f64::from(count);
        self.findings.figure("launch_host_us", us(spent.host));
        self.findings.figure("launch_device_us", us(spent.device));
        // Verifies that every one of them ran.
        let off = (number.f_get(0)?.f_double_value(&[])? - 2.0 * f64::from(count)).abs();
        self.findings.check("launches that did nothing", off, 0.0);
        Ok(())
    }

    /// Uploading a few numbers from the host: from pageable memory, which blocks, and from pinned memory, which does
    /// not.
    fn uploads(&self) -> anyhow::Result<()> {
        let numbers: Vec<i64> = (0..64).collect();
        let count = if self.small { 50 } else { 500 };
        let us = |seconds: f64| 1e6 * seconds / f64::from(count);
        let blocking = timed(self.device, || {
            for _ in 0..count {
                let _ = Tensor::f_from_slice(&numbers)?.f_to_device(self.device)?;
            }
            Ok(())
        })?;
        self.findings.figure("upload_blocking_us", us(blocking.host));
        let pinned = timed(self.device, || {
            for _ in 0..count {
                let _ = accelerator::upload(&numbers, self.device)?;
            }
            Ok(())
        })?;
        self.findings.figure("upload_pinned_us", us(pinned.host));
        let back = Vec::<i64>::try_from(&accelerator::upload(&numbers, self.device)?)?;
        self.findings.check(
            "uploaded numbers that differ",
            f64::from(u8::from(back != numbers)),
            0.0,
        );
        Ok(())
    }

    /// The sampler's building blocks for 16 images.
    fn selection(&self) -> anyhow::Result<()> {
        let scores = Tensor::f_randn([16, 8192], (Kind::Float, self.device))?;
        type Op = fn(&Tensor) -> anyhow::Result<Tensor>;
        let ops: [(&str, Op); 4] = [
            ("top 2000 of 8192, 16 rows", |scores| {
                Ok(scores.f_topk(2000, 1, true, true)?.0)
            }),
            ("sort of 8192, 16 rows", |scores| Ok(scores.f_sort(1, true)?.0)),
            ("softmax in f64 and sums, 16 rows", |scores| {
                Ok(scores.f_softmax(1, Kind::Double)?.f_cumsum(1, Kind::Double)?)
            }),
            ("argmax, 16 rows", |scores| Ok(scores.f_argmax(1, false)?)),
        ];
        for (name, op) in ops {
            let measured = self.ms(|| op(&scores)).map(|ms| json!({"ms": ms}));
            self.row("selection", json!({"operation": name}), measured)?;
        }
        Ok(())
    }
}
