//! `loraweld devices`

use clap::Args;
use loraweld::compute::{AdapterSummary, Capabilities, Device, DeviceOptions, Precision, Select};
use serde_json::{Value, json};

use super::args::Global;
use super::output::{Output, Table, count, size};

/// List the devices, what they can do, and which one `--device` takes.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld devices
  loraweld devices --device gpu          which one `gpu` would be
  WGPU_BACKEND=vulkan loraweld devices")]
pub struct Devices {}

impl Devices {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let mut adapters = Device::adapters();
        // Only a device that is open can tell whether its compiler leaves double-single sums alone.
        for (i, adapter) in adapters.iter_mut().enumerate() {
            let options = DeviceOptions {
                select: Select::Index(i),
                precision: Precision::DoubleSingle,
                ..DeviceOptions::default()
            };
            adapter.capabilities.double_single = Some(Device::open(&options).is_ok());
        }
        // A choice that cannot be had is something to list, not a failure, unless it was asked for.
        let chosen = match Device::choice(&global.device) {
            Err(e) if global.device != Select::Auto => return Err(e.into()),
            other => other,
        };
        for (index, adapter) in adapters.iter().enumerate() {
            out.event("adapter", &describe(index, adapter))?;
        }
        let mut table = Table::new(&[">index", "name", "backend", "kind", "driver"]);
        for (i, a) in adapters.iter().enumerate() {
            table.row([i.to_string(), a.name.clone(), a.backend.clone(), a.kind.into(), a.driver.clone()]);
        }
        if adapters.is_empty() {
            out.result("no GPU found: is a Vulkan, Metal or DX12 driver installed?")?;
        } else {
            out.result(table)?;
            out.result("")?;
            out.result(abilities(&adapters))?;
        }
        out.result("")?;
        let asked = name(&global.device);
        match chosen {
            Ok(chosen) => {
                let device = chosen.map_or("cpu", |i| adapters.get(i).map_or("?", |a| &a.name));
                out.event("chosen", &json!({ "asked": asked, "index": chosen, "name": device }))?;
                let why = match (chosen, &global.device) {
                    (None, Select::Auto) if adapters.is_empty() => ", as there is no GPU",
                    (None, Select::Auto) => {
                        ", as there is no hardware GPU; a software adapter is used only when asked for"
                    }
                    _ => "",
                };
                let place = chosen.map_or("the CPU".to_owned(), |i| format!("{i}: {device}"));
                out.result(format_args!("`--device {asked}` takes {place}{why}"))?;
            }
            Err(e) => {
                out.event("chosen", &json!({ "asked": asked, "index": null, "error": e.to_string() }))?;
                out.result(format_args!("`--device {asked}` fails: {e}"))?;
            }
        }
        let threads = std::thread::available_parallelism().map_or(1, Into::into);
        out.event("cpu", &json!({ "threads": threads }))?;
        out.result(format_args!("`--device cpu` always works: f64 on {}", count(threads, "thread")))
    }
}

/// As on the command line.
fn name(select: &Select) -> String {
    match select {
        Select::Auto => "auto".into(),
        Select::Cpu => "cpu".into(),
        Select::Gpu => "gpu".into(),
        Select::Index(i) => i.to_string(),
        Select::Name(name) => name.clone(),
    }
}

fn describe(index: usize, adapter: &AdapterSummary) -> Value {
    let AdapterSummary { name, backend, kind, driver, capabilities: c } = adapter;
    json!({
        "index": index,
        "name": name,
        "backend": backend,
        "kind": kind,
        "driver": driver,
        "f64": c.f64,
        "f16": c.f16,
        "subgroups": c.subgroups,
        "matrix_units": c.cooperative_matrix,
        "double_single": c.double_single,
        "timestamps": c.timestamps,
        "max_binding": c.max_binding,
        "max_buffer": c.max_buffer,
        "workgroup_memory": c.workgroup_memory,
        "workgroup_invocations": c.workgroup_invocations,
    })
}

fn abilities(adapters: &[AdapterSummary]) -> Table {
    let headings = [
        ">index",
        "f64",
        "f16",
        "double-single",
        "subgroups",
        "matrix units",
        ">binding",
        ">buffer",
        ">workgroup",
        ">invocations",
    ];
    let mut table = Table::new(&headings);
    let yes = |b: bool| if b { "yes" } else { "no" }.to_owned();
    for (i, AdapterSummary { capabilities: c, .. }) in adapters.iter().enumerate() {
        table.row([
            i.to_string(),
            yes(c.f64),
            yes(c.f16),
            // Only a self-test on the opened device tells.
            c.double_single.map_or("n/a".into(), yes),
            subgroups(c),
            match c.cooperative_matrix.len() {
                0 => "no".into(),
                n => count(n, "shape"),
            },
            size(c.max_binding),
            size(c.max_buffer),
            size(c.workgroup_memory.into()),
            c.workgroup_invocations.to_string(),
        ]);
    }
    table
}

fn subgroups(c: &Capabilities) -> String {
    match c.subgroups {
        None => "no".into(),
        Some((min, max)) if min == max => min.to_string(),
        Some((min, max)) => format!("{min} to {max}"),
    }
}
