//! What commands share that read checkpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use loraweld::adapter::write_atomic;
use loraweld::{Adapter, Bake, BakeOptions, Checkpoint, Family};
use serde::Serialize;
use serde_json::json;

use super::output::{Output, Table, count, size, some};
use crate::io::atomic::len;

/// Opens a checkpoint, and says what the user should know about it.
pub fn open(path: &Path, model: Option<Family>, out: &Output) -> anyhow::Result<Checkpoint> {
    let checkpoint = Checkpoint::open(path)?;
    for note in checkpoint.notes() {
        out.warn(note)?;
    }
    Ok(match model {
        Some(family) => checkpoint.with_family(family),
        None => checkpoint,
    })
}

/// Writes a report as JSON.
pub fn write_report(
    path: &Path,
    force: bool,
    protect: &[PathBuf],
    report: &impl Serialize,
) -> anyhow::Result<()> {
    write_atomic(path, force, protect, |file| {
        serde_json::to_writer_pretty(&mut *file, report)?;
        file.write_all(b"\n")
    })?;
    Ok(())
}

/// What a checkpoint is, and which of the adapters fit it.
pub fn show(checkpoint: &Checkpoint, adapters: &[Adapter], out: &Output) -> anyhow::Result<()> {
    let modules = checkpoint.modules();
    let bytes: u64 = checkpoint.files().map(len).sum();
    let files = checkpoint.files().count();
    let family = checkpoint.family();
    let dtypes: BTreeSet<&str> = modules.iter().map(|module| module.dtype.as_str()).collect();
    let mut components: BTreeMap<&str, [usize; 4]> = BTreeMap::new();
    for module in &modules {
        let component = module.layers.first().map_or("", |key| key.component());
        let [known, layers, fused, other] = components.entry(component).or_default();
        match module.known {
            true => *known += 1,
            false => *other += 1,
        }
        *layers += if module.known { module.layers.len() } else { 0 };
        *fused += usize::from(module.layers.len() > 1);
    }
    let fits = adapters.iter().map(|adapter| {
        let options = BakeOptions { skip_unmatched: true, ..Default::default() };
        let bake = Bake::new(checkpoint, &[adapter.at(1.0)], &options);
        (adapter, bake.map(|bake| bake.left_out().len()).map_err(|e| e.to_string()))
    });
    let fits: Vec<_> = fits.collect();
    out.event(
        "checkpoint",
        &json!({
            "path": checkpoint.path(),
            "files": files,
            "bytes": bytes,
            "family": family.to_string(),
            "families": family.candidates().filter_map(Family::id).collect::<Vec<_>>(),
            "dtypes": dtypes,
            "components": components.iter().map(|(name, [known, layers, fused, other])| json!({
                "component": name, "modules": known, "layers": layers, "fused": fused, "unknown": other,
            })).collect::<Vec<_>>(),
            "adapters": fits.iter().map(|(adapter, fit)| json!({
                "file": adapter.path(),
                "layers": adapter.layers().len(),
                "unmatched": fit.as_ref().ok(),
                "error": fit.as_ref().err(),
            })).collect::<Vec<_>>(),
        }),
    )?;
    out.result(checkpoint.path().display())?;
    let line = |label: &str, text: String| out.result(format_args!("  {label:<12} {text}"));
    line("checkpoint", family.to_string())?;
    line("size", format!("{}, {}, {}", size(bytes), count(files, "file"), some(&dtypes, 6)))?;
    let fit = match family {
        Family::UNKNOWN => {
            "those whose layers are called as its tensors are: its model is not known".to_owned()
        }
        family => format!("those for {family}, in any spelling"),
    };
    line("LoRAs", fit)?;
    let mut table = Table::new(&["  component", ">modules", ">layers", ">fused", ">not known"]);
    for (name, [known, layers, fused, other]) in &components {
        let name = if name.is_empty() { "main model" } else { name };
        table.row([
            format!("  {name}"),
            known.to_string(),
            layers.to_string(),
            fused.to_string(),
            other.to_string(),
        ]);
    }
    out.result(table)?;
    for (adapter, fit) in fits {
        let all = adapter.layers().len();
        let text = match fit {
            Ok(0) => format!("fits: all of its {} find their weights", count(all, "layer")),
            Ok(left) => format!("{left} of its {} find no weight", count(all, "layer")),
            Err(error) => format!("does not fit: {error}"),
        };
        line(adapter.name(), text)?;
    }
    Ok(())
}
