//! Which family a file's layers are of: the one whose names, widths and metadata fit, or all that do.

use std::collections::{BTreeMap, BTreeSet};

use super::record::{Hit, Record, Row, Taken, having, pattern, records};
use super::{Family, Names, Widths, inventory, is_encoder, processor};

/// What recognising a family takes of a layer: its component, the prefix and the flat name that the file has, and its
/// widths.
pub(in crate::adapter) struct Clue<'a> {
    pub component: &'a str,
    pub prefix: &'a str,
    pub flat: &'a str,
    pub widths: Widths,
}

/// What was recognised, and what the user should know about it.
pub(in crate::adapter) struct Recognised {
    pub family: Family,
    pub note: Option<String>,
}

/// Evidence for one family.
struct Evidence {
    family: Family,
    /// Modules of the file that it has.
    covered: usize,
    /// Whether one of its models has all of those.
    one_model: bool,
    /// Whether one of its models has them with these widths, or with widths in this proportion.
    exact: bool,
    in_proportion: bool,
    /// Fused modules whose widths are in the proportion of one of its models.
    fused: usize,
    /// Whether one of its models has no block beyond those of the file, in any list of blocks that the file has.
    full: bool,
    /// Whether a loader is known to take such names of it by the file's prefixes.
    documented: bool,
    /// Whether it has the text encoders that the file has.
    encoders: bool,
}

/// The families of a file's layers.
pub(in crate::adapter) fn recognise(clues: &[Clue], metadata: &BTreeMap<String, String>) -> Recognised {
    let (encoders, main): (Vec<&Clue>, Vec<&Clue>) =
        clues.iter().partition(|clue| is_encoder(clue.component));
    let by_names = by_names(&main, &encoders);
    let Some((word, said)) = said(metadata) else {
        return Recognised { family: by_names.0, note: None };
    };
    let (likely, possible) = by_names;
    let likely_said = likely.and(said);
    if likely_said != Family::UNKNOWN {
        return Recognised { family: likely_said, note: None };
    }
    if possible.and(said) != Family::UNKNOWN {
        return Recognised { family: possible.and(said), note: None };
    }
    if possible == Family::UNKNOWN {
        return Recognised { family: said, note: None };
    }
    let note = format!(
        "its metadata says `{word}`, which is {said}, but its layers have the names of {likely}: the model counts as \
         unknown unless it is told"
    );
    Recognised { family: Family::UNKNOWN, note: Some(note) }
}

/// The families that fit the names best, and all that fit the names.
fn by_names(clues: &[&Clue], encoders: &[&Clue]) -> (Family, Family) {
    let old = |clue: &&&Clue<'_>| Some((clue.flat.to_owned(), processor(clue.flat)?));
    let processed: BTreeMap<String, String> = clues.iter().filter_map(|clue| old(&clue)).collect();
    let parsed: Vec<Parsed<'_>> = clues
        .iter()
        .map(|clue| {
            let (key, numbers) = pattern(clue.flat);
            if having(&key) == 0
                && let Some((key, numbers)) = processed.get(clue.flat).map(|name| pattern(name))
            {
                return Parsed { having: having(&key), key, numbers, clue };
            }
            Parsed { having: having(&key), key, numbers, clue }
        })
        .collect();
    let mut all: Vec<Evidence> = records()
        .iter()
        .zip(Family::all())
        .filter_map(|(record, family)| evidence(record, family, &parsed, encoders))
        .collect();
    let set = |all: &[Evidence]| Family(all.iter().fold(0, |set, e| set | e.family.0));
    // The share of names that an inventory covers has to be at least a half.
    let most = all.iter().map(|e| e.covered).max().unwrap_or(0);
    if most * 2 < clues.len() {
        return (Family::UNKNOWN, Family::UNKNOWN);
    }
    all.retain(|e| e.covered == most);
    let possible = set(&all);
    let fused = all.iter().map(|e| e.fused).max().unwrap_or(0);
    let better: [&dyn Fn(&Evidence) -> bool; 7] = [
        &|e| e.one_model,
        &|e| e.exact,
        &|e| e.encoders,
        &|e| e.documented,
        &|e| e.in_proportion,
        &|e| e.fused == fused,
        &|e| e.full,
    ];
    for better in better {
        if all.iter().any(better) {
            all.retain(better);
        }
    }
    (set(&all), possible)
}

/// A flat name's pattern, the numbers in it, the families that have such a name, and what else is known of the layer.
struct Parsed<'a> {
    key: String,
    numbers: Vec<(u32, &'a str)>,
    having: u128,
    clue: &'a Clue<'a>,
}

fn evidence(
    record: &'static Record,
    family: Family,
    clues: &[Parsed<'_>],
    encoders: &[&Clue],
) -> Option<Evidence> {
    let n = record.models.len();
    let (mut covered, mut fused, mut documented) = (0, 0, true);
    let mut rows: BTreeMap<*const Row, (&Row, BTreeSet<Vec<&str>>)> = BTreeMap::new();
    let (mut with_names, mut exact, mut proportional) = (vec![true; n], vec![true; n], vec![true; n]);
    for Parsed { key, numbers, having, clue } in clues {
        if having & family.0 == 0 {
            continue;
        }
        let mut hits = record.find(inventory(clue.component), key, numbers);
        hits.retain(|hit| !hit.models.is_empty() && can_be_cut(record, hit, clue.widths));
        if hits.is_empty() {
            continue;
        }
        covered += 1;
        documented &= hits.iter().any(|hit| is_documented(record, hit.name.of, clue));
        fused += usize::from(
            hits.iter().any(|hit| hit.name.part.is_some() && in_proportion(record, hit, clue.widths)),
        );
        if let Some(hit) = hits.first() {
            let (_, blocks) = rows.entry(std::ptr::from_ref(hit.row)).or_insert((hit.row, BTreeSet::new()));
            blocks.insert(hit.blocks.clone());
        }
        for model in 0..n {
            let of_model = || hits.iter().filter(|hit| hit.models.contains(&model));
            let shapes = || of_model().filter_map(|hit| shape(record, hit, model));
            let known = clue.widths.0 > 0 && clue.widths.1 > 0;
            with_names[model] &= of_model().next().is_some();
            exact[model] &= !known || shapes().any(|shape| shape == clue.widths);
            proportional[model] &= !known || shapes().any(|shape| is_proportional(shape, clue.widths));
        }
    }
    let one = |of: &[bool]| of.iter().zip(&with_names).any(|(fits, named)| *fits && *named);
    (covered > 0).then(|| Evidence {
        family,
        covered,
        one_model: one(&with_names),
        exact: one(&exact),
        in_proportion: one(&proportional),
        full: (0..n).any(|model| {
            with_names[model] && rows.values().all(|(row, blocks)| row.instances(model) == blocks.len())
        }),
        fused,
        documented,
        encoders: !encoders.is_empty() && encoders.iter().all(|clue| has_encoder(record, clue)),
    })
}

/// Whether some loader is known to take such names after the prefix.
fn is_documented(record: &Record, names: Names, clue: &Clue) -> bool {
    // Others may stand before any model's names.
    const TELLING: [&str; 4] = ["transformer.", "unet.", "diffusion_model.", "lora_unet_"];
    let prefix = clue.prefix;
    let is_taken = |taken: &Taken| taken.names == names && taken.prefix == prefix;
    !clue.component.is_empty()
        || !TELLING.contains(&prefix)
        || record.comfyui_takes.iter().chain(&record.diffusers_takes).any(is_taken)
        || (prefix == "lora_unet_" && record.kohya_takes.contains(&names))
}

/// Whether the family has such a text encoder.
fn has_encoder(record: &Record, clue: &Clue) -> bool {
    record.encoders.iter().filter(|encoder| encoder.component == clue.component).any(|encoder| {
        let clip = ["text_model_", "resblocks_"].iter().any(|first| clue.flat.starts_with(first))
            || clue.flat == "text_projection";
        let t5 = clue.flat.starts_with("encoder_block_");
        match encoder.comfyui {
            "clip_l" | "clip_g" | "clip_h" => clip || clue.flat.starts_with("encoder_layers_"),
            "t5xxl" | "umt5xxl" => t5,
            _ => !clip && !t5,
        }
    })
}

/// The widths of a module in a model.
fn shape(record: &'static Record, hit: &Hit, model: usize) -> Option<Widths> {
    match hit.name.part {
        Some((_, fused)) => record.fused[fused].shape(model),
        None => hit.row.shapes.get(model)?.as_ref().map(|shape| (shape.columns(), shape.output)),
    }
}

/// Whether a module that fuses others can be cut into them.
fn can_be_cut(record: &'static Record, hit: &Hit, (input, output): Widths) -> bool {
    let fused = hit.name.part.map(|(_, fused)| &record.fused[fused]);
    input == 0 || output == 0 || fused.is_none_or(|fused| fused.rows(input, output).is_some())
}

fn is_proportional(known: Widths, found: Widths) -> bool {
    known.0 as u128 * found.1 as u128 == known.1 as u128 * found.0 as u128
}

/// Whether a module of the family has widths in this proportion.
pub(super) fn in_proportion(record: &'static Record, hit: &Hit, widths: Widths) -> bool {
    (0..record.models.len())
        .filter_map(|model| shape(record, hit, model))
        .any(|shape| is_proportional(shape, widths))
}

/// How far widths are from the proportion that a module of the family has, as the logarithm of their ratio.
pub(super) fn apart(record: &'static Record, hit: &Hit, widths: Widths) -> f64 {
    let ratio = |(input, output): Widths| (output as f64 / input.max(1) as f64).max(f64::MIN_POSITIVE).ln();
    let shapes = (0..record.models.len()).filter_map(|model| shape(record, hit, model));
    shapes.map(|known| (ratio(known) - ratio(widths)).abs()).fold(f64::INFINITY, f64::min)
}

/// What the metadata calls the model, and which families that may be.
fn said(metadata: &BTreeMap<String, String>) -> Option<(&str, Family)> {
    let keys = ["modelspec.architecture", "ss_base_model_version"];
    keys.iter().filter_map(|key| metadata.get(*key)).find_map(|text| {
        let plain = |text: &str| -> String {
            text.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
        };
        let begins = |word: &&str| text.split('/').map(plain).any(|part| part.starts_with(*word));
        let longest = |record: &Record| record.words.iter().filter(|w| begins(w)).map(|w| w.len()).max();
        let most = records().iter().filter_map(longest).max()?;
        let families = records().iter().zip(Family::all());
        let named = families.filter(|(record, _)| longest(record) == Some(most));
        Some((text.as_str(), Family(named.fold(0, |set, (_, family)| set | family.0))))
    })
}
