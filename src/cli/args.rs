//! Arguments that several commands share.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser, ValueParser};
use loraweld::adapter::BlockPreset;
use loraweld::compute::{Device, DeviceOptions, Precision, Select};
use loraweld::{Adapter, Family, Format, OpenOptions, Spectrum, Strengths};

use super::host;
use super::output::{Output, quoted};

/// Options that every command takes.
#[derive(Args, Debug)]
pub struct Global {
    /// Where to compute: `auto`, `cpu`, `gpu`, an index of `loraweld devices`, or a part of a name.
    ///
    /// `auto` takes a hardware GPU, else the CPU; a software adapter only `gpu`, an index or a name.
    /// WGPU_BACKEND and WGPU_ADAPTER_NAME are honoured. Compiled shaders are kept in the folder LORAWELD_CACHE, or in the
    /// user's cache folder; nowhere if it is empty.
    #[arg(
        long,
        global = true,
        value_name = "DEVICE",
        default_value = "auto",
        help_heading = "Global options"
    )]
    pub device: Select,

    /// Arithmetic: `auto` (f32 products, wider sums and factorisations), `fast` (the same, with statistics of 11 bits where
    /// the GPU has matrix units), `f64` or `double-single` throughout.
    #[arg(long, global = true, value_name = "TIER", default_value = "auto", help_heading = "Global options")]
    pub precision: Precision,

    /// Print events and results as JSON lines on stdout.
    #[arg(long, global = true, help_heading = "Global options")]
    pub json: bool,

    /// Say nothing but results that were asked for, warnings and errors.
    #[arg(short, long, global = true, conflicts_with = "verbose", help_heading = "Global options")]
    pub quiet: bool,

    /// Log what happens to stderr; twice or thrice for more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count, help_heading = "Global options")]
    pub verbose: u8,
}

impl Global {
    /// Opens the device, says which, and says once what the user should know about it.
    pub fn open_device(&self, memory: &Memory, out: &Output) -> anyhow::Result<Device> {
        let device = host::device(&DeviceOptions {
            select: self.device.clone(),
            precision: self.precision,
            memory: memory.mib.map(|mib| mib << 20),
            pipeline_cache: cache_folder(),
            ..Default::default()
        })?;
        out.event("device", &serde_json::json!({ "device": device.describe(), "note": device.note() }))?;
        out.info(format_args!("device     {}", device.describe()))?;
        if let Some(note) = device.note() {
            out.warn(note)?;
        }
        Ok(device)
    }
}

/// Where compiled pipelines are kept: `LORAWELD_CACHE` (nowhere if it is empty), else the user's cache folder.
pub fn cache_folder() -> Option<PathBuf> {
    match std::env::var_os("LORAWELD_CACHE") {
        Some(folder) => Some(PathBuf::from(folder)).filter(|folder| !folder.as_os_str().is_empty()),
        None => dirs::cache_dir().map(|folder| folder.join("loraweld")),
    }
}

/// The device's budget.
#[derive(Args, Debug, Default)]
pub struct Memory {
    /// Device memory to stay within, in MiB; layers that need more are computed on the CPU.
    #[arg(
        long = "memory",
        value_name = "MIB",
        value_parser = clap::value_parser!(u64).range(1..=1 << 30)
    )]
    pub mib: Option<u64>,
}

/// How the output's keys are spelled.
#[derive(Clone, Copy, Debug)]
pub enum OutputFormat {
    /// As the first input spells them.
    Same,
    /// Another spelling.
    As(Format),
}

impl OutputFormat {
    /// As the library wants it.
    pub fn format(self) -> Option<Format> {
        match self {
            Self::Same => None,
            Self::As(format) => Some(format),
        }
    }
}

impl std::str::FromStr for OutputFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "same" => Ok(Self::Same),
            _ => text.parse().map(Self::As).map_err(|e| format!("{e}, or `same`")),
        }
    }
}

/// A finite number.
pub fn finite(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(x) if x.is_finite() => Ok(x),
        Ok(x) => Err(format!("is {x}; expected a finite number")),
        Err(_) => Err("expected a number".into()),
    }
}

/// A finite number that is not negative.
pub fn weight(text: &str) -> Result<f64, String> {
    match finite(text)? {
        x if x >= 0.0 => Ok(x),
        x => Err(format!("is {x}; expected 0 or more")),
    }
}

/// What `--sv-ratio`, `--sv-fro` and `--sv-cumulative` ask for, of which at most one is given.
pub fn spectrum(ratio: Option<f64>, fro: Option<f64>, cumulative: Option<f64>) -> Option<Spectrum> {
    let spectrum = ratio.map(Spectrum::Ratio).or(fro.map(Spectrum::Frobenius));
    spectrum.or(cumulative.map(Spectrum::Cumulative))
}

/// A share above 0 and at most 1.
pub fn share(text: &str) -> Result<f64, String> {
    match finite(text)? {
        x if x > 0.0 && x <= 1.0 => Ok(x),
        x => Err(format!("is {x}; expected a share above 0 and at most 1")),
    }
}

/// `PATH` or `PATH:STRENGTH`.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraArg {
    /// The file or PEFT folder.
    pub path: PathBuf,
    /// The factor on its whole update.
    pub strength: f64,
    /// Whether the strength was spelled out.
    pub explicit: bool,
}

impl LoraArg {
    /// For clap; takes paths that are not UTF-8, too.
    pub fn parser() -> ValueParser {
        ValueParser::new(OsStringValueParser::new().try_map(Self::parse))
    }

    fn parse(text: OsString) -> Result<Self, String> {
        Self::parse_with(text, Path::exists)
    }

    /// What follows the last colon is a strength if it is a number, unless the whole names something that
    /// exists: paths may hold colons (`C:\`) themselves.
    fn parse_with(text: OsString, exists: impl Fn(&Path) -> bool) -> Result<Self, String> {
        if text.is_empty() {
            return Err("is empty; expected PATH or PATH:STRENGTH".into());
        }
        let whole = || Ok(Self { path: PathBuf::from(&text), strength: 1.0, explicit: false });
        if exists(Path::new(&text)) {
            return whole();
        }
        // A path that is not UTF-8 cannot carry a strength.
        let Some((path, tail)) = text.to_str().and_then(|text| text.rsplit_once(':')) else {
            return whole();
        };
        let is_drive = path.len() == 1 && path.as_bytes()[0].is_ascii_alphabetic();
        let path = Path::new(path);
        if is_drive && !exists(path) {
            return whole();
        }
        match tail.parse::<f64>() {
            Ok(_) if path.as_os_str().is_empty() => {
                Err(format!("no path stands before `:{tail}`; expected PATH:STRENGTH"))
            }
            Ok(strength) if strength.is_finite() => {
                Ok(Self { path: path.to_owned(), strength, explicit: true })
            }
            Ok(strength) => Err(format!("the strength is {strength}; expected a finite number")),
            Err(_) if exists(path) => {
                Err(format!("`{tail}` after the colon is not a number; expected PATH:STRENGTH"))
            }
            Err(_) => whole(),
        }
    }
}

/// How files are read that do not say everything, or are no plain LoRAs.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Reading")]
pub struct Reading {
    /// Alpha of every layer, whatever the files say.
    #[arg(long, value_name = "ALPHA", value_parser = finite, allow_hyphen_values = true)]
    alpha: Option<f64>,
    /// Read LoHa, LoKr, DoRA and whole differences as LoRAs of this rank at most, and say what that loses.
    #[arg(long, value_name = "RANK", value_parser = clap::value_parser!(u32).range(1..))]
    allow_truncate: Option<u32>,
    /// Weights of the base model, a file or a folder of shards: DoRA depends on them.
    #[arg(long, value_name = "PATH")]
    base: Option<PathBuf>,
    /// Leave out what cannot be merged, such as biases and norms, and say what it was.
    #[arg(long)]
    skip_unsupported: bool,
    /// The model that the files are for, where they do not tell or tell something wrong: an id such as `flux1`, `sdxl`,
    /// `z_image`; a wrong one lists them all.
    #[arg(long, value_name = "ID", value_parser = model)]
    model: Option<Family>,
}

/// The id of a model on the command line.
pub fn model(text: &str) -> Result<Family, String> {
    Family::named(text).ok_or_else(|| {
        let ids: Vec<&str> = Family::all().filter_map(Family::id).collect();
        format!("there is no model of this id; known are {}", ids.join(", "))
    })
}

impl Reading {
    /// The model that was told.
    pub fn model(&self) -> Option<Family> {
        self.model
    }

    fn options(&self) -> OpenOptions {
        OpenOptions {
            alpha: self.alpha,
            truncate: self.allow_truncate.map(|rank| rank as usize),
            base: self.base.clone(),
            skip_unsupported: self.skip_unsupported,
            family: self.model,
        }
    }
}

/// Strengths by layer.
#[derive(Args, Debug, Default)]
#[command(next_help_heading = "Strengths by layer")]
pub struct ByLayer {
    /// A factor on the layers whose name matches; `*` stands for anything. Repeatable, the last match counts; `NAME:` in
    /// front, the name of a file without its extension, is for that one alone.
    #[arg(long, value_name = "[NAME:]PATTERN=W", value_parser = by_name, allow_hyphen_values = true)]
    strength_for: Vec<(String, f64)>,
    /// Factors on blocks: a list as A1111's block weights have it (17 or 26 for SD 1 and 2, 12 or 20 for SDXL, 61 for
    /// FLUX.1, one for each block and one before them for all else of other models), or one of `ALL`, `NONE`, `INS`, `IND`, `INALL`, `MIDD`, `OUTD`, `OUTS`, `OUTALL`, `DOUBLE`, `SINGLE`.
    /// Repeatable with `NAME:` in front.
    #[arg(long, value_name = "[NAME:]W,W,...", allow_hyphen_values = true)]
    blocks: Vec<String>,
}

/// `PATTERN=W`.
fn by_name(text: &str) -> Result<(String, f64), String> {
    let Some((pattern, strength)) = text.rsplit_once('=').filter(|(pattern, _)| !pattern.is_empty()) else {
        return Err("expected PATTERN=W, such as 'single_transformer_blocks.*=0.5'".into());
    };
    Ok((pattern.to_owned(), finite(strength)?))
}

impl ByLayer {
    /// As the command line has them.
    pub fn words(&self) -> Vec<String> {
        let of = |option: &str, text: String| format!("--{option} {}", quoted(Path::new(&text)));
        let by_name = self.strength_for.iter().map(|(name, w)| of("strength-for", format!("{name}={w}")));
        by_name.chain(self.blocks.iter().map(|text| of("blocks", text.clone()))).collect()
    }

    /// The adapters at these strengths, and the strengths in words, if there are any.
    pub fn apply(&self, adapters: Vec<Adapter>) -> anyhow::Result<(Vec<Adapter>, Option<String>)> {
        if self.strength_for.is_empty() && self.blocks.is_empty() {
            return Ok((adapters, None));
        }
        let names: Vec<String> = adapters.iter().map(|adapter| adapter.name().to_owned()).collect();
        // Whose it is, and what follows the name.
        let split = |text: &str| match text.split_once(':') {
            Some((name, rest)) if names.iter().any(|n| n == name) => (Some(name.to_owned()), rest.to_owned()),
            _ => (None, text.to_owned()),
        };
        let is_for =
            |whose: &Option<String>, adapter: &Adapter| whose.as_ref().is_none_or(|n| n == adapter.name());
        let rules: Vec<_> =
            self.strength_for.iter().map(|(text, strength)| (split(text), *strength)).collect();
        for ((whose, pattern), _) in &rules {
            let of = adapters.iter().filter(|adapter| is_for(whose, adapter));
            if !of.flat_map(|adapter| adapter.layers()).any(|layer| layer.matches(pattern)) {
                return Err(super::usage(format!("--strength-for: no layer's name matches `{pattern}`")));
            }
        }
        let mut said = Vec::new();
        let adapters = adapters
            .into_iter()
            .map(|adapter| {
                let rules = rules.iter().filter(|((whose, pattern), _)| {
                    is_for(whose, &adapter) && adapter.layers().iter().any(|layer| layer.matches(pattern))
                });
                let by_name = rules.map(|((_, pattern), strength)| (pattern.clone(), *strength)).collect();
                let mut blocks =
                    self.blocks.iter().map(|text| split(text)).filter(|(whose, _)| is_for(whose, &adapter));
                let by_block = blocks.next_back().map(|(_, text)| blocks_of(&adapter, &text)).transpose()?;
                let strengths = Strengths { by_name, by_block };
                if strengths.is_empty() {
                    return Ok(adapter);
                }
                said.push(format!("{}: {strengths}", adapter.name()));
                Ok(adapter.with_strengths(&strengths)?)
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        Ok((adapters, (!said.is_empty()).then(|| said.join("; "))))
    }
}

/// A list of numbers, or a named one.
fn blocks_of(adapter: &Adapter, text: &str) -> anyhow::Result<Vec<f64>> {
    let is_named = !text.is_empty() && text.bytes().all(|b| b.is_ascii_uppercase());
    let blocks = match is_named {
        true => BlockPreset::named(adapter.family(), text)?,
        false => text
            .split(',')
            .map(|w| finite(w).map_err(|e| super::usage(format!("--blocks: `{w}`: {e}"))))
            .collect::<anyhow::Result<_>>()?,
    };
    Ok(blocks)
}

/// Opens every adapter, in order. A file that may be for several models is for the one that all others are for.
pub fn open_adapters(loras: &[LoraArg], reading: &Reading) -> anyhow::Result<Vec<Adapter>> {
    open_adapters_for(Family::UNKNOWN, loras, reading)
}

/// Opens adapters for a model, as far as that is known. `--model` knows better.
pub fn open_adapters_for(
    family: Family,
    loras: &[LoraArg],
    reading: &Reading,
) -> anyhow::Result<Vec<Adapter>> {
    let options = reading.options();
    let open = |lora: &LoraArg| host::adapter(&lora.path, &options);
    let mut adapters = loras.iter().map(open).collect::<loraweld::Result<Vec<_>>>()?;
    let families = adapters.iter().map(Adapter::family).chain([family]).filter(|f| *f != Family::UNKNOWN);
    let Some(common) = families.reduce(Family::and).filter(|family| *family != Family::UNKNOWN) else {
        return Ok(adapters);
    };
    for (adapter, lora) in adapters.iter_mut().zip(loras) {
        if ![common, Family::UNKNOWN].contains(&adapter.family()) {
            *adapter = host::adapter(&lora.path, &OpenOptions { family: Some(common), ..options.clone() })?;
        }
    }
    Ok(adapters)
}

/// Opens adapters for a command to which strengths mean nothing, and says so if there are any.
pub fn open_unweighted(
    loras: &[LoraArg],
    reading: &Reading,
    why: &str,
    out: &Output,
) -> anyhow::Result<Vec<Adapter>> {
    let adapters = open_adapters(loras, reading)?;
    for note in adapters.iter().flat_map(|adapter| adapter.notes()) {
        out.warn(note)?;
    }
    if loras.iter().any(|lora| lora.explicit) {
        out.warn(format_args!("strengths are ignored: {why}"))?;
    }
    Ok(adapters)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, existing: &[&str]) -> Result<(String, f64), String> {
        let lora = LoraArg::parse_with(text.into(), |path| existing.iter().any(|e| path == Path::new(e)))?;
        Ok((lora.path.display().to_string(), lora.strength))
    }

    #[test]
    fn strengths_follow_the_last_colon() {
        let is = |text, existing, path: &str, strength| {
            assert_eq!(parse(text, existing), Ok((path.to_owned(), strength)), "{text}");
        };
        is("a.safetensors", &[], "a.safetensors", 1.0);
        is("a.safetensors:0.8", &["a.safetensors"], "a.safetensors", 0.8);
        is("a.safetensors:-1e-1", &[], "a.safetensors", -0.1);
        is("a:b.safetensors:2", &[], "a:b.safetensors", 2.0);
        is("a:b.safetensors", &[], "a:b.safetensors", 1.0);
        is(r"C:\a.safetensors", &[], r"C:\a.safetensors", 1.0);
        is(r"C:\a.safetensors:.5", &[], r"C:\a.safetensors", 0.5);
        is("C:1", &[], "C:1", 1.0);
        is("a:1", &["a"], "a", 1.0);
        is("a.safetensors:0.5", &["a.safetensors:0.5", "a.safetensors"], "a.safetensors:0.5", 1.0);
    }

    #[test]
    fn bad_strengths_are_refused() {
        for (text, expected) in [
            ("", "empty"),
            ("a.safetensors:nan", "finite"),
            ("a.safetensors:-inf", "finite"),
            ("a.safetensors:1e999", "finite"),
            ("a.safetensors:x", "not a number"),
            ("a.safetensors:", "not a number"),
            (":1", "no path"),
        ] {
            let error = parse(text, &["a.safetensors"]).expect_err(text);
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn ranges() {
        assert_eq!(weight("0.5"), Ok(0.5));
        for text in ["-1", "nan", "inf", "x", ""] {
            assert!(weight(text).is_err(), "{text}");
        }
        assert_eq!(finite("-1"), Ok(-1.0));
    }
}
