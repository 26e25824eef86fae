//! Calibrates and merges adapters by SSR, with the library alone.
//!
//! ```text
//! cargo run --release --example merge_ssr -- OUT.safetensors CAT.safetensors CAT-INPUTS DOG.safetensors DOG-INPUTS
//! ```
//!
//! Each adapter is followed by what its layers read: a file, or a folder of shards. Without arguments it takes four
//! small adapters of the tests, and writes to the system's folder for temporary files.

use std::error::Error;
use std::path::{Path, PathBuf};

use loraweld::{Adapter, Calibration, Control, Device, Progress, SaveOptions, Source, Ssr};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (output, inputs) = match arguments.split_first() {
        None => (std::env::temp_dir().join("loraweld-example.safetensors"), fixtures()),
        Some((output, rest)) if rest.len() >= 4 && rest.len() % 2 == 0 => (output.clone(), rest.to_vec()),
        Some(_) => return Err("usage: merge_ssr OUT (LORA ACTIVATIONS) (LORA ACTIVATIONS)...".into()),
    };
    let device = Device::auto()?;
    println!("on {}", device.describe());
    if let Some(note) = device.note() {
        println!("note: {note}");
    }

    let adapters: Vec<Adapter> = inputs.iter().step_by(2).map(Adapter::open).collect::<Result<_, _>>()?;
    let progress = |p: Progress<'_>| {
        if p.done == p.total {
            println!("{}: {} done", p.stage, p.total);
        }
    };
    let control = Control { progress: Some(&progress), cancel: None };
    let mut calibration = Calibration::new(&adapters)?;
    for (task, activations) in inputs.iter().skip(1).step_by(2).enumerate() {
        let read = calibration.accumulate_path(&device, Source::Task(task), activations, &control)?;
        for layer in read.unknown {
            println!("{}: no adapter has the layer {layer}", activations.display());
        }
    }

    // The first adapter at full strength, the others a little weaker.
    let strength = |i: usize| if i == 0 { 1.0 } else { 0.9 };
    let weighted: Vec<_> = adapters.iter().enumerate().map(|(i, adapter)| adapter.at(strength(i))).collect();
    let merged = Ssr::new(&calibration).merge_with(&device, &weighted, control)?;
    merged.adapter.save(&output, &SaveOptions { overwrite: true, ..SaveOptions::default() })?;
    println!("{}", merged.report);
    println!("wrote {}", output.display());
    Ok(())
}

/// Adapters and what their layers read, by turns.
fn fixtures() -> Vec<PathBuf> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    ["concept_c3_mirror", "concept_c7_rot90", "concept_c1_thick", "concept_c4_invert"]
        .iter()
        .flat_map(|name| {
            ["loras", "activations/traj4"].map(|folder| data.join(folder).join(format!("{name}.safetensors")))
        })
        .collect()
}
