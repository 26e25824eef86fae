//! `loraweld demo`

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use loraweld::adapter::write_atomic;
use loraweld::calibration::Source;
use loraweld::compute::{Device, Select};
use loraweld::{Adapter, Calibration, SaveOptions, Ssr};
use serde_json::json;

use super::args::{Global, Memory};
use super::calibrate::accumulate;
use super::host;
use super::merge::{losses, say_merged};
use super::output::{Output, quoted, size};
use super::report::{Made, Norms};
use crate::io::atomic::len;

/// Calibrate and merge four small adapters that come with the program, and show what is lost.
#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  loraweld demo
  loraweld demo --device cpu --out /tmp/demo")]
pub struct Demo {
    /// Folder to write to; files of an earlier demo in it are overwritten.
    #[arg(long, value_name = "DIR", default_value = "loraweld-demo")]
    out: PathBuf,
}

/// An adapter, and what its layers read while it was active.
struct Concept {
    name: &'static str,
    adapter: &'static [u8],
    activations: &'static [u8],
}

// The tests' fixtures, so that the source carries them once.
macro_rules! concept {
    ($name:literal) => {
        Concept {
            name: concat!($name, ".safetensors"),
            adapter: include_bytes!(concat!("../../tests/data/loras/", $name, ".safetensors")),
            activations: include_bytes!(concat!(
                "../../tests/data/activations/traj4/",
                $name,
                ".safetensors"
            )),
        }
    };
}

const CONCEPTS: [Concept; 4] = [
    concept!("concept_c3_mirror"),
    concept!("concept_c7_rot90"),
    concept!("concept_c1_thick"),
    concept!("concept_c4_invert"),
];

/// By this file, a folder is known to be an earlier demo's.
const MARKER: &str = "README.txt";
const README: &str = "\
Written by `loraweld demo`, which overwrites its files when it is run again.

adapters/                 four LoRAs of a small diffusion transformer that draws digits: a mirrored 3, a
                          rotated 7, a thick 1 and a 4 with inverted contrast; rank 4 to 16, f16 to f32
activations/              what their layers read in four sampler steps
calibration.safetensors   what `loraweld calibrate` made of those
merged.safetensors        the four as one LoRA
report.html               what that did and lost, layer by layer, to look at in a browser
";

impl Demo {
    pub fn run(self, global: &Global, out: &Output) -> anyhow::Result<()> {
        let dir = &self.out;
        out.info(
            "Four LoRAs of a small diffusion transformer, each trained to draw one digit in its own way.",
        )?;
        let [adapters, activations, calibration_file, merged_file, page_file] =
            ["adapters", "activations", "calibration.safetensors", "merged.safetensors", "report.html"]
                .map(|n| dir.join(n));
        let device = global.open_device(&Memory::default(), out)?;
        if let Some(why) = why(&device, &global.device) {
            out.info(format_args!("           {why}"))?;
        }
        prepare(dir)?;
        for (folder, bytes) in
            [(&adapters, (|c| c.adapter) as fn(&Concept) -> &'static [u8]), (&activations, |c| c.activations)]
        {
            create(folder)?;
            for concept in &CONCEPTS {
                write(&folder.join(concept.name), bytes(concept))?;
            }
        }
        let opened = CONCEPTS.iter().map(|concept| Adapter::open(adapters.join(concept.name)));
        let opened: Vec<Adapter> = opened.collect::<loraweld::Result<_>>()?;
        let mut calibration = Calibration::new(&opened)?;
        for (i, concept) in CONCEPTS.iter().enumerate() {
            let path = activations.join(concept.name);
            accumulate(&mut calibration, &device, Source::Task(i), &path, out)?;
        }
        calibration.save(&calibration_file, true)?;
        let weighted: Vec<_> = opened.iter().map(|adapter| adapter.at(1.0)).collect();
        let merged = out.long(|control| {
            let merged = Ssr::new(&calibration).merge_with(&device, &weighted, *control)?;
            merged.measured(&calibration, &weighted, control)
        })?;
        let options = SaveOptions {
            overwrite: true,
            metadata: merged.adapter.metadata().clone(),
            ..Default::default()
        };
        merged.adapter.save(&merged_file, &options)?;

        let bytes = len(&merged_file);
        let made = Made {
            report: &merged.report,
            output: &merged_file,
            bytes,
            dtype: merged.adapter.dtype().name(),
            format: merged.adapter.format().name(),
            warnings: out.warnings(),
            calibration: Some(&calibration_file),
            norms: Norms::of(&weighted, &merged_file),
        };
        write(&page_file, made.page().text()?.as_bytes())?;
        let fields = json!({
            "output": merged_file, "bytes": bytes, "calibration": calibration_file, "page": page_file,
            "report": merged.report,
        });
        out.event("result", &fields)?;
        say_merged(&merged.report, out)?;
        if let Some(table) = losses(&merged.report) {
            out.info("")?;
            out.result(table)?;
            out.result(
                "0: every adapter does on its own inputs what it does alone; 1: as bad as none at all.",
            )?;
            out.result(
                "The plain sum lets the adapters talk over each other; the average makes them whisper.",
            )?;
        }
        out.info("")?;
        out.info(format_args!("wrote      {} ({})", merged_file.display(), size(bytes)))?;
        next_steps(dir, out)?;
        out.info("")?;
        out.info(format_args!(
            "Open {} in a browser to look at this merge layer by layer.",
            page_file.display()
        ))
    }
}

/// Makes the folder, unless it holds somebody else's files.
fn prepare(dir: &Path) -> anyhow::Result<()> {
    create(dir)?;
    let shown = dir.display();
    let mut entries = std::fs::read_dir(dir).with_context(|| format!("{shown}: cannot list"))?;
    if entries.next().is_some() {
        let marker = std::fs::read_to_string(dir.join(MARKER)).unwrap_or_default();
        if marker.lines().next() != README.lines().next() {
            bail!("{shown}: the folder is not empty, and not of an earlier demo; choose another with --out");
        }
    }
    write(&dir.join(MARKER), README.as_bytes())
}

fn create(dir: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("{}: cannot create the folder", dir.display()))
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    Ok(write_atomic(path, true, &[], |file| std::io::Write::write_all(file, bytes))?)
}

/// Why this device, unless a note of its own stands between.
fn why(device: &Device, select: &Select) -> Option<&'static str> {
    match select {
        _ if device.note().is_some() => None,
        Select::Auto => Some("a hardware GPU, which `--device auto` prefers"),
        _ => Some("asked for by --device"),
    }
}

/// Commands that work as they stand here.
fn next_steps(dir: &Path, out: &Output) -> anyhow::Result<()> {
    let program = host::words().into_iter().next().unwrap_or_default();
    let program = quoted(Path::new(&program));
    let each = |folder: &str| {
        let folder = dir.join(folder);
        CONCEPTS.map(|concept| quoted(&folder.join(concept.name)))
    };
    let file = |name: &str| quoted(&dir.join(name));
    let [mirror, rot90, thick, invert] = each("adapters");
    let calibration = file("calibration.safetensors");
    let commands = [
        format!("{program} inspect {}", file("merged.safetensors")),
        format!("{program} calibration show {calibration}"),
        format!(
            "{program} merge ssr {mirror}:0.8 {rot90} {thick} {invert} --calibration {calibration} -o {} --force",
            file("mine.safetensors")
        ),
        format!(
            "{program} calibrate {mirror} {rot90} --activations {} -o {} --force",
            each("activations")[..2].join(" "),
            file("two.calibration.safetensors")
        ),
    ];
    out.event("next", &json!({ "commands": commands }))?;
    out.info("")?;
    out.info("Next, with these files or your own:")?;
    for command in commands {
        out.info(format_args!("  {command}"))?;
    }
    Ok(())
}
