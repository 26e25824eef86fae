//! What must hold of every record: names come back, mean one thing, and lead to their own family or to none.

use std::collections::{BTreeMap, BTreeSet};

use super::record::{Name, Record, Row, records};
use super::*;
use crate::adapter::keys::{Bare, prefix};

/// Every module of a model in one spelling: its row, its name, its path, its key and its widths.
struct Spelled {
    path: String,
    key: String,
    component: &'static str,
    widths: Widths,
    part: Option<usize>,
}

/// The modules of a model by the names of one kind; of each list of blocks `all`, or the first and the last.
fn spelled(record: &'static Record, model: usize, of: Names, all: bool) -> Vec<Spelled> {
    let mut found = Vec::new();
    for row in &record.rows {
        let Some(shape) = &row.shapes[model] else { continue };
        for name in row.names.iter().filter(|name| name.of == of) {
            for numbers in numbers(row, model, all) {
                let blocks: Vec<String> = numbers.iter().map(u32::to_string).collect();
                let blocks: Vec<&str> = blocks.iter().map(String::as_str).collect();
                found.push(Spelled {
                    path: fill(name.path, &blocks),
                    key: flat(&fill(row.path(), &blocks)),
                    component: row.component,
                    widths: widths(record, name, model).unwrap_or((shape.columns(), shape.output)),
                    part: name.part.map(|(index, _)| index),
                });
            }
        }
    }
    found
}

fn widths(record: &Record, name: &Name, model: usize) -> Option<Widths> {
    name.part.and_then(|(_, fused)| record.fused[fused].shape(model))
}

/// What `{}` stands for: every combination.
fn numbers(row: &Row, model: usize, all: bool) -> Vec<Vec<u32>> {
    row.blocks(model).iter().fold(vec![Vec::new()], |combinations, ranges| {
        let mut values: Vec<u32> = ranges.iter().flat_map(|(a, b)| *a..=*b).collect();
        if !all && values.len() > 2 {
            values = vec![values[0], values[values.len() - 1]];
        }
        let with = |c: &Vec<u32>| values.iter().map(|v| [&c[..], &[*v]].concat()).collect::<Vec<_>>();
        combinations.iter().flat_map(with).collect()
    })
}

fn each() -> impl Iterator<Item = (Family, &'static Record)> {
    Family::all().zip(records())
}

const SPELLINGS: [Names; 4] = [Names::Diffusers, Names::Native, Names::Xlabs, Names::Other];

#[test]
fn records_are_whole() {
    assert!(records().len() <= 128, "a family is a bit of 128");
    for (family, record) in each() {
        assert_eq!(Family::named(record.id), Some(family));
        assert!(!record.rows.is_empty() && !record.models.is_empty(), "{}", record.id);
        for row in &record.rows {
            assert_eq!(row.shapes.len(), record.models.len(), "{}: {}", record.id, row.path());
            let free = row.path().matches("{}").count();
            for (model, shape) in row.shapes.iter().enumerate() {
                let blocks = row.blocks(model).len();
                assert!(shape.is_none() || blocks == free, "{}: {}: its blocks", record.id, row.path());
            }
            for name in &row.names {
                assert_eq!(name.path.matches("{}").count(), free, "{}: {}", record.id, name.path);
            }
        }
        for fused in &record.fused {
            assert!(fused.parts.len() > 1, "{}: {} has one part", record.id, fused.path);
        }
    }
}

#[test]
fn flat_names_find_their_dots_in_every_inventory() {
    for (family, record) in each() {
        for model in 0..record.models.len() {
            for of in SPELLINGS {
                for module in spelled(record, model, of, false) {
                    let what = format!("{} ({}): {}", record.id, record.models[model], module.path);
                    let found = family
                        .module(module.component, &flat(&module.path), Some(module.widths), Some(of))
                        .unwrap_or_else(|| panic!("{what} is not found"));
                    match (module.part, &found.fused) {
                        (None, None) => assert_eq!(found.key, module.key, "{what}"),
                        (Some(part), Some((fused, parts))) => {
                            assert_eq!(flat(&parts[part]), module.key, "{what}");
                            let (input, output) = module.widths;
                            let rows = fused.rows(input, output).unwrap_or_else(|| panic!("{what}: rows"));
                            assert_eq!(rows.iter().sum::<usize>(), output, "{what}");
                        }
                        _ => panic!("{what}: {found:?}"),
                    }
                }
            }
        }
    }
}

#[test]
fn keys_lead_back_to_names_in_every_format() {
    for (family, record) in each() {
        for model in 0..record.models.len() {
            for format in Format::ALL {
                let Some(of) = names(record, format) else { continue };
                for module in spelled(record, model, of, false) {
                    let what = format!("{} in {format}: {}", record.id, module.path);
                    let place = family
                        .place(module.component, &module.key, format, None, module.widths)
                        .unwrap_or_else(|e| panic!("{what}: {e}"));
                    assert_eq!(place.path, module.path, "{what}");
                    assert_eq!(place.part.map(|(i, _)| i), module.part, "{what}");
                }
            }
        }
    }
}

#[test]
fn no_two_modules_share_a_name_and_its_widths() {
    for (_, record) in each() {
        for model in 0..record.models.len() {
            let mut seen: BTreeMap<(String, Widths), BTreeSet<String>> = BTreeMap::new();
            for module in SPELLINGS.iter().flat_map(|of| spelled(record, model, *of, true)) {
                let name = (format!("{}:{}", module.component, flat(&module.path)), module.widths);
                if module.part.is_none() {
                    seen.entry(name).or_default().insert(module.key);
                }
            }
            let clash = seen.iter().find(|(_, keys)| keys.len() > 1);
            assert!(clash.is_none(), "{} ({}): {clash:?}", record.id, record.models[model]);
        }
    }
}

/// A random number, the same in every run.
fn random(state: &mut u64, below: usize) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize % below.max(1)
}

#[test]
fn subsets_lead_to_their_family_or_to_none() {
    let mut state = 7;
    let (mut known, mut all) = (0, 0);
    for (family, record) in each() {
        for model in 0..record.models.len() {
            for of in SPELLINGS {
                let modules = spelled(record, model, of, true);
                for size in [1, 2, 3, 5, 8, 20, modules.len()] {
                    if modules.is_empty() {
                        continue;
                    }
                    let taken = record.comfyui_takes.iter().chain(&record.diffusers_takes);
                    let taken = taken.filter(|taken| taken.names == of).map(|taken| taken.prefix);
                    let everywhere = ["", "base_model.model.", "_orig_mod."];
                    let prefixes: Vec<&str> = taken.chain(everywhere).collect();
                    let p = prefixes[random(&mut state, prefixes.len())];
                    let chosen: Vec<&Spelled> = match size == modules.len() {
                        true => modules.iter().collect(),
                        false => (0..size).map(|_| &modules[random(&mut state, modules.len())]).collect(),
                    };
                    let bare: Vec<Bare> = chosen
                        .iter()
                        .map(|module| match (module.component, p.ends_with('_')) {
                            ("", true) => Bare::parse(&format!("{p}{}", flat(&module.path))),
                            ("", false) => Bare::parse(&format!("{p}{}", module.path)),
                            (component, _) => Bare::parse(&format!("{component}.{}", module.path)),
                        })
                        .collect();
                    let clues: Vec<Clue> = bare
                        .iter()
                        .zip(&chosen)
                        .map(|(bare, module)| Clue {
                            component: &bare.component,
                            prefix: p,
                            flat: &bare.flat,
                            widths: module.widths,
                        })
                        .collect();
                    let found = recognise(&clues, &BTreeMap::new()).family;
                    assert!(
                        found.and(family) == family || found == Family::UNKNOWN,
                        "{} of {} modules of {} ({}), {of:?}, prefix `{p}`, such as {} {:?}: {found}",
                        chosen.len(),
                        modules.len(),
                        record.id,
                        record.models[model],
                        chosen[0].path,
                        chosen[0].widths,
                    );
                    (known, all) = (known + usize::from(found == family), all + 1);
                }
            }
        }
    }
    // Most subsets tell which family they are of.
    assert!(known * 5 > all * 3, "{known} of {all} were recognised");
}

#[test]
fn metadata_decides_between_families_and_never_against_the_names() {
    let clue = |flat: &'static str, widths| Clue { component: "", prefix: "", flat, widths };
    let of = |key: &str, text: &str| BTreeMap::from([(key.to_owned(), text.to_owned())]);
    let base = "ss_base_model_version";
    let named = |id| Family::named(id).unwrap();
    let both = [clue("single_transformer_blocks_3_attn_to_q", (3072, 3072))];
    let found = recognise(&both, &BTreeMap::new()).family;
    assert!(found.and(named("flux1")) != Family::UNKNOWN && found.and(named("chroma")) != Family::UNKNOWN);
    assert_eq!(recognise(&both, &of(base, "chroma")).family, named("chroma"));
    assert_eq!(recognise(&both, &of(base, "flux1")).family, named("flux1"));
    let against = recognise(&both, &of("modelspec.architecture", "Qwen-Image/lora"));
    assert_eq!(against.family, Family::UNKNOWN);
    assert!(against.note.is_some_and(|note| note.contains("Qwen-Image/lora")));
    for (text, id) in [
        ("stable-diffusion-xl-v1-base/lora", "sdxl"),
        ("flux-1-dev/lora", "flux1"),
        ("Flux.2-klein-9b/lora", "flux2"),
        ("lumina-2/lora", "lumina2"),
        ("wan2.2-animate", "wan"),
        ("framepack/lora", "hunyuan_video"),
        ("hunyuan_video_1_5", "hunyuan_video15"),
        ("black-forest-labs/FLUX.1-dev", "flux1"),
    ] {
        assert_eq!(recognise(&[], &of("modelspec.architecture", text)).family, named(id), "{text}");
    }
}

#[test]
fn prefixes_are_taken_off_known_names_alone() {
    for (name, length) in [
        ("model.blocks.0.attn1.to_q", "model.".len()),
        ("pipe.dit.blocks.0.self_attn.q", "pipe.dit.".len()),
        ("transformer._orig_mod.blocks.0.attn1.to_q", "transformer._orig_mod.".len()),
        ("module.model.blocks.0.attn1.to_q", "module.model.".len()),
        ("model.of_mine.0.q", 0),
        ("net.work.q", 0),
        (
            "text_encoders.qwen25_7b.transformer.model.layers.0.mlp.up_proj",
            "text_encoders.qwen25_7b.transformer.".len(),
        ),
    ] {
        assert_eq!(prefix(name).1, length, "{name}");
    }
    assert_eq!(prefix("transformer_2.blocks.0.attn1.to_q").0, "transformer_2");
    assert_eq!(prefix("lora_te4_model_layers_0_mlp_up_proj").0, "text_encoder_4");
}

/// Tensors of a file, by their keys.
type Held = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn held(path: &std::path::Path) -> Held {
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensors = file.tensors().into_iter();
    tensors.map(|(name, t)| (name, (t.shape().to_vec(), t.data().to_vec()))).collect()
}

/// A file of modules of rank 2, at a 32nd of their widths.
fn write(path: &std::path::Path, prefix: &str, (a, b): (&str, &str), modules: &[&Spelled], alpha: bool) {
    let mut state = 3;
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut seen = BTreeSet::new();
    for module in modules {
        let flat_names = prefix.ends_with('_');
        let path = if flat_names { flat(&module.path) } else { module.path.clone() };
        let name = match module.component {
            "" => format!("{prefix}{path}"),
            component => format!("{component}.{path}"),
        };
        if !seen.insert(name.clone()) {
            continue;
        }
        let (input, output) = (module.widths.0.div_ceil(32), module.widths.1.div_ceil(32));
        let mut values = |n: usize| -> Vec<u8> {
            (0..n).flat_map(|_| (1.0 + random(&mut state, 1000) as f32 / 1000.0).to_le_bytes()).collect()
        };
        tensors.push((format!("{name}{a}"), vec![2, input], values(2 * input)));
        tensors.push((format!("{name}{b}"), vec![output, 2], values(2 * output)));
        if alpha {
            tensors.push((format!("{name}.alpha"), vec![], 2f32.to_le_bytes().to_vec()));
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.clone(), view.unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// A file as each format of a family has it, with modules that have names in all formats of `through`.
fn each_file(through: &[Format], mut check: impl FnMut(Family, &str, Format, &std::path::Path)) {
    let folder = tempfile::tempdir().unwrap();
    for (family, record) in each() {
        for format in [Format::Peft, Format::Comfyui, Format::Kohya] {
            let Some(of) = names(record, format).filter(|of| record.has(*of)) else { continue };
            let Some(prefix) = family.prefix("", format) else { continue };
            for model in 0..record.models.len() {
                let all = spelled(record, model, of, false);
                let everywhere = |m: &&Spelled| {
                    m.component.is_empty()
                        && through
                            .iter()
                            .all(|to| family.place(m.component, &m.key, *to, None, m.widths).is_ok())
                };
                let modules: Vec<&Spelled> = all.iter().filter(everywhere).collect();
                if modules.is_empty() {
                    continue;
                }
                let path = folder.path().join("in.safetensors");
                let suffixes = match format {
                    Format::Kohya => (".lora_down.weight", ".lora_up.weight"),
                    _ => (".lora_A.weight", ".lora_B.weight"),
                };
                write(&path, &prefix, suffixes, &modules, format == Format::Kohya);
                let what = format!("{} ({}) in {format}", record.id, record.models[model]);
                check(family, &what, format, &path);
            }
        }
    }
}

fn open(path: &std::path::Path, family: Family, what: &str) -> crate::Adapter {
    let options = crate::OpenOptions { family: Some(family), ..Default::default() };
    crate::Adapter::open_with(path, &options).unwrap_or_else(|e| panic!("{what}: {e}"))
}

fn save(adapter: &crate::Adapter, path: &std::path::Path, format: Option<Format>, what: &str) {
    let options = crate::SaveOptions { format, overwrite: true, ..Default::default() };
    adapter.save(path, &options).unwrap_or_else(|e| panic!("{what} to {format:?}: {e}"));
}

#[track_caller]
fn assert_same(found: &Held, expected: &Held, what: &str) {
    let keys = |held: &Held| held.keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(found), keys(expected), "{what}");
    let wrong = expected.iter().find(|(key, tensor)| &found[*key] != *tensor);
    assert!(wrong.is_none(), "{what}: {} differs", wrong.unwrap().0);
}

#[test]
fn every_family_comes_back_through_every_format() {
    let folder = tempfile::tempdir().unwrap();
    let (other, back) = (folder.path().join("other.safetensors"), folder.path().join("back.safetensors"));
    let mut chains = 0;
    for via in [Format::Peft, Format::Comfyui, Format::Kohya] {
        each_file(&[via], |family, what, format, path| {
            if family.writable(via) == Family::UNKNOWN {
                return;
            }
            let what = format!("{what} through {via}");
            let adapter = open(path, family, &what);
            save(&adapter, &other, Some(via), &what);
            save(&open(&other, family, &what), &back, Some(format), &what);
            assert_same(&held(&back), &held(path), &what);
            chains += 1;
        });
    }
    assert!(chains > 300, "{chains} chains");
}

#[test]
fn every_family_stays_what_it_is_in_its_own_spelling_and_at_its_own_rank() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    each_file(&[], |family, what, _, path| {
        let adapter = open(path, family, what);
        save(&adapter, &out, None, what);
        assert_same(&held(&out), &held(path), what);
        // Fused modules keep their rank, which is that of the file.
        let resize = crate::SvdMerge::new(crate::Truncation::rank(2));
        let resized = resize.merge(&crate::Device::cpu(), &[adapter.at(1.0)]).unwrap().adapter;
        save(&resized, &out, None, what);
        assert_same(&held(&out), &held(path), &format!("{what}, resized to its own rank"));
    });
}

#[test]
fn the_table_of_models_lists_every_family() {
    let table = include_str!("../../../docs/models.md");
    for (family, record) in each() {
        let has = |format| if family.writable(format) == Family::UNKNOWN { "-" } else { "yes" };
        let lists: Vec<String> =
            record.stacks.iter().map(|(letter, stack)| format!("{letter} `{stack}`")).collect();
        let row = format!(
            "| {} | `{}` | {} | {} | {} | {} | {} |",
            record.name,
            record.id,
            has(Format::Peft),
            has(Format::Comfyui),
            has(Format::Kohya),
            has(Format::Bfl),
            lists.join(", ")
        );
        assert!(table.contains(&row), "docs/models.md lacks this row:\n{row}");
    }
    let rows = table.lines().filter(|line| line.contains("| yes |") || line.contains("| - |")).count();
    assert_eq!(rows, records().len(), "docs/models.md has rows of models that there are not");
    let count = format!("{} families", records().len());
    for (name, text) in [("README.md", include_str!("../../../README.md")), ("docs/models.md", table)] {
        assert!(text.contains(&count), "{name} does not say that there are {count}");
    }
}
