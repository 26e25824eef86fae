//! What is done with a string of random bytes: whole adapters, calibrations and checkpoints are made of it, go through the
//! program, and are compared with what a plain reader makes of them. The fuzz targets in `fuzz/` do the same.

use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;

use arbitrary::{Result, Unstructured};
use loraweld::merge::verify;
use loraweld::{
    Adapter, Bake, BakeOptions, Calibration, Checkpoint, Control, Device, Dtype, Format, LayerKey, Linear,
    Matrix, Method, OpenOptions, SaveOptions, SvdMerge, Truncation, Unnamed, WriteAt,
};
use serde_json::{Map, Value, json};

/// A file that is put together.
#[derive(Default)]
struct File {
    header: Map<String, Value>,
    data: Vec<u8>,
}

impl File {
    /// Adds a tensor; a name that is there already stays as it is, and gives false.
    fn add(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: Vec<u8>) -> bool {
        if self.header.contains_key(name) {
            return false;
        }
        let place = [self.data.len(), self.data.len() + bytes.len()];
        self.header.insert(name.into(), json!({ "dtype": dtype, "shape": shape, "data_offsets": place }));
        self.data.extend(bytes);
        true
    }

    fn bytes(&self) -> Vec<u8> {
        let header = serde_json::to_vec(&self.header).expect("a header");
        [&(header.len() as u64).to_le_bytes()[..], &header, &self.data].concat()
    }
}

const TYPES: [(&str, usize); 8] =
    [("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8), ("F8_E4M3", 1), ("F8_E5M2", 1), ("I64", 8), ("U8", 1)];

/// Finite values of a type, and what they are.
fn values(u: &mut Unstructured<'_>, dtype: &str, n: usize) -> Result<(Vec<u8>, Vec<f64>)> {
    let (mut bytes, mut values) = (Vec::new(), Vec::new());
    for _ in 0..n {
        // Eighths are in every type.
        let v = f32::from(u.int_in_range(-15i8..=15)?) / 8.0;
        values.push(f64::from(v));
        match dtype {
            "F32" => bytes.extend(v.to_le_bytes()),
            "F16" => bytes.extend(half::f16::from_f32(v).to_le_bytes()),
            "BF16" => bytes.extend(half::bf16::from_f32(v).to_le_bytes()),
            "F64" => bytes.extend(f64::from(v).to_le_bytes()),
            _ => bytes
                .extend(vec![u.arbitrary::<u8>()?; TYPES.iter().find(|t| t.0 == dtype).map_or(1, |t| t.1)]),
        }
    }
    Ok((bytes, values))
}

/// What the plain reader knows of a layer.
struct Plain {
    module: String,
    rows: usize,
    cols: usize,
    update: Vec<f64>,
}

const PAIRS: [(&str, &str); 5] = [
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
];
const OTHERS: [&str; 14] = [
    ".hada_w1_a",
    ".hada_w1_b",
    ".hada_w2_a",
    ".hada_w2_b",
    ".lokr_w1",
    ".lokr_w2",
    ".lora_magnitude_vector",
    ".dora_scale",
    ".lora_mid.weight",
    ".diff",
    ".diff_b",
    ".alpha",
    ".lora_B.bias",
    ".reshape_weight",
];

/// Any mix of suffixes, shapes, types, alphas, duplicates and aliases; and what of it is plain.
fn file(u: &mut Unstructured<'_>) -> Result<(File, Vec<Plain>)> {
    let (mut file, mut plain) = (File::default(), Vec::new());
    // Nearly always plain, so that much gets to the end.
    let wild = u.ratio(1u8, 4)?;
    for i in 0..u.int_in_range(1..=5usize)? {
        let part = ["to_q", "to_k", "to_v", "to_out.0"][u.int_in_range(0..=3usize)?];
        let name =
            format!("transformer_blocks.{}.attn.{part}", if wild { u.int_in_range(0..=2usize)? } else { i });
        let kohya = u.ratio(1u8, 3)?;
        let module = match kohya {
            true => format!("lora_unet_{}", name.replace('.', "_")),
            false if wild => {
                ["transformer.", "diffusion_model.", "base_model.model.", "unet.", ""]
                    [u.int_in_range(0..=4usize)?]
                .to_owned()
                    + &name
            }
            false => format!("transformer.{name}"),
        };
        let (a, b) = if wild { PAIRS[u.int_in_range(0..=4usize)?] } else { PAIRS[usize::from(kohya)] };
        let (rank, input, output) =
            (u.int_in_range(1..=4usize)?, u.int_in_range(1..=9usize)?, u.int_in_range(1..=9usize)?);
        let dtype =
            if wild { TYPES[u.int_in_range(0..=7usize)?].0 } else { TYPES[u.int_in_range(0..=2usize)?].0 };
        let other = if wild && u.ratio(1u8, 4)? { u.int_in_range(0..=5usize)? } else { rank };
        let (a_bytes, a_values) = values(u, dtype, rank * input)?;
        let (b_bytes, b_values) = values(u, dtype, output * other)?;
        let mut is_plain = !wild && file.add(&format!("{module}{a}"), dtype, &[rank, input], a_bytes.clone());
        if wild {
            file.add(&format!("{module}{a}"), dtype, &[rank, input], a_bytes);
        }
        is_plain &= file.add(&format!("{module}{b}"), dtype, &[output, other], b_bytes);
        let mut scale = 1.0;
        if u.ratio(1u8, 2)? {
            let alpha = f32::from(u.int_in_range(1..=32u8)?) / 4.0;
            scale = f64::from(alpha) / rank as f64;
            file.add(&format!("{module}.alpha"), "F32", &[], alpha.to_le_bytes().to_vec());
        }
        if wild && u.ratio(1u8, 2)? {
            let suffix = OTHERS[u.int_in_range(0..=13usize)?];
            let shape = [[output, rank], [rank, input], [output, 1], [1, 1]][u.int_in_range(0..=3usize)?];
            let bytes = values(u, dtype, shape[0] * shape[1])?.0;
            file.add(&format!("{module}{suffix}"), dtype, &shape, bytes);
        }
        if is_plain {
            let entry = |e: usize| {
                (0..rank)
                    .map(|k| b_values[e / input * rank + k] * a_values[k * input + e % input])
                    .sum::<f64>()
                    * scale
            };
            plain.push(Plain {
                module,
                rows: output,
                cols: input,
                update: (0..output * input).map(entry).collect(),
            });
        } else if !wild {
            // A second file of that name would say something else.
            return Err(arbitrary::Error::IncorrectFormat);
        }
    }
    if wild {
        let text: String = u.arbitrary()?;
        let field =
            ["ss_network_args", "lora_adapter_metadata", "ss_network_alpha", "modelspec.architecture"]
                [u.int_in_range(0..=3usize)?];
        file.header.insert("__metadata__".into(), json!({ field: text }));
    }
    Ok((file, plain))
}

/// What is written to.
#[derive(Default)]
struct Memory(Mutex<Vec<u8>>);

impl WriteAt for Memory {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut all = self.0.lock().expect("no panics");
        let end = offset as usize + bytes.len();
        if all.len() < end {
            all.resize(end, 0);
        }
        all[offset as usize..end].copy_from_slice(bytes);
        Ok(())
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let all = self.0.lock().expect("no panics");
        buffer.copy_from_slice(&all[offset as usize..][..buffer.len()]);
        Ok(())
    }
    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.0.lock().expect("no panics").resize(bytes as usize, 0);
        Ok(())
    }
}

fn update(layer: &loraweld::Layer) -> Matrix {
    let (a, b): (Vec<f64>, Vec<f64>) = (layer.a().to_vec(), layer.b().to_vec());
    let (rank, input) = (layer.rank(), layer.input());
    Matrix::from_fn(layer.output(), input, |i, j| {
        layer.scale().value * (0..rank).map(|k| b[i * rank + k] * a[k * input + j]).sum::<f64>()
    })
}

/// The updates of an adapter, by key.
fn updates(adapter: &Adapter) -> BTreeMap<String, Matrix> {
    adapter.layers().iter().map(|layer| (layer.key().as_str().to_owned(), update(layer))).collect()
}

/// The largest sum of the magnitudes of what an entry of an update is the sum of.
fn terms(layer: &loraweld::Layer) -> f64 {
    let (a, b): (Vec<f64>, Vec<f64>) = (layer.a().to_vec(), layer.b().to_vec());
    let (rank, input) = (layer.rank(), layer.input());
    let of = |i: usize, j: usize| (0..rank).map(|k| (b[i * rank + k] * a[k * input + j]).abs()).sum::<f64>();
    let all = (0..layer.output()).flat_map(|i| (0..input).map(move |j| (i, j)));
    layer.scale().value.abs() * all.fold(0.0, |most, (i, j)| f64::max(most, of(i, j)))
}

/// What factors of f32 may lose of an update's terms, which may cancel.
const ROUNDED: f64 = 1e-6;

/// Whether an update is right, within `bound` of its largest entry and `rounded` of its terms.
fn near(what: &str, got: &loraweld::Layer, want: &[f64], bound: f64, rounded: f64) {
    let most = want.iter().fold(0f64, |most, v| most.max(v.abs()));
    let bound = bound * most + rounded * terms(got);
    for (got, want) in update(got).data().iter().zip(want) {
        assert!((got - want).abs() <= bound, "{what}: {got} but {want}");
    }
}

fn saved(adapter: &Adapter, options: &SaveOptions) -> loraweld::Result<Vec<u8>> {
    let sink = Memory::default();
    adapter.save_to("saved", &sink, options, Control::default())?;
    Ok(sink.0.into_inner().expect("no panics"))
}

/// Any bytes for a file: the header of safetensors, shapes, and whatever kind of adapter its tensors make.
pub fn header(data: &[u8]) {
    if let Ok(adapter) = Adapter::from_bytes("fuzz", data.to_vec()) {
        let _ = adapter.check_finite();
        let _ = adapter.a_sha256();
        for layer in adapter.layers() {
            assert_eq!(layer.a().bytes().len(), layer.rank() * layer.input() * layer.a().dtype().size());
            assert_eq!(layer.b().bytes().len(), layer.rank() * layer.output() * layer.b().dtype().size());
        }
    }
}

/// Lines for the keys of tensors: prefixes, names of families, suffixes.
pub fn keys(text: &str) {
    let mut header = Map::new();
    let mut end = 0;
    for line in text.lines().take(16) {
        let key = LayerKey::parse(line);
        assert_eq!(LayerKey::parse(key.as_str()), key, "{line}");
        // A matrix that is A or B of whatever it is: 2 x 2 of f16.
        let info = json!({ "dtype": "F16", "shape": [2, 2], "data_offsets": [end, end + 8] });
        if header.insert(line.to_owned(), info).is_none() {
            end += 8;
        }
    }
    let bytes = File { header, data: [0, 0x3c].repeat(end / 2) }.bytes();
    if let Ok(adapter) = Adapter::from_bytes("fuzz", bytes) {
        for layer in adapter.layers() {
            assert!(Format::ALL.contains(&layer.format().unwrap_or(Format::Peft)));
            assert!(layer.matches("*") && !layer.block().is_empty());
            assert!(layer.key().as_str() == LayerKey::parse(&layer.name()).as_str(), "{}", layer.name());
        }
    }
}

/// Any text for the fields of the metadata that are read.
pub fn metadata(text: &str) {
    const FIELDS: [&str; 8] = [
        "lora_adapter_metadata",
        "lora_alpha",
        "ss_network_alpha",
        "ss_network_args",
        "ss_tag_frequency",
        "ss_base_model_version",
        "modelspec.architecture",
        "modelspec.trigger_phrase",
    ];
    for field in FIELDS {
        let mut file = File::default();
        file.header.insert("__metadata__".into(), json!({ field: text }));
        file.add("transformer.a.0.q.lora_A.weight", "F16", &[1, 2], vec![0x3c; 4]);
        file.add("transformer.a.0.q.lora_B.weight", "F16", &[2, 1], vec![0x3c; 4]);
        if let Ok(adapter) = Adapter::from_bytes("fuzz", file.bytes()) {
            assert!(adapter.layers()[0].scale().value.is_finite());
            let _ = Adapter::common_metadata([&adapter, &adapter]);
        }
    }
}

/// A whole adapter: inspected, converted, merged and read back.
pub fn adapter(u: &mut Unstructured<'_>) -> Result<()> {
    let (file, plain) = file(u)?;
    let bytes = file.bytes();
    let options = OpenOptions { skip_unsupported: u.arbitrary()?, ..Default::default() };
    let adapter = match Adapter::from_bytes_with("fuzz", bytes, &options) {
        Ok(adapter) => adapter,
        Err(error) => {
            assert!(plain.is_empty() || !error.to_string().is_empty());
            assert!(plain.is_empty(), "what is plain was refused: {error}");
            return Ok(());
        }
    };
    for layer in adapter.layers() {
        assert!(layer.matches("*") && !layer.block().is_empty() && !layer.name().is_empty());
        assert_eq!(layer.a().bytes().len(), layer.rank() * layer.input() * layer.a().dtype().size());
    }
    if adapter.check_finite().is_err() {
        return Ok(());
    }
    for of in &plain {
        let layer = adapter.find(&of.module).unwrap_or_else(|| panic!("`{}` is lost", of.module));
        assert_eq!((layer.output(), layer.input()), (of.rows, of.cols));
        near(&of.module, layer, &of.update, 1e-12, 0.0);
        let norm = of.update.iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!((layer.norm() - norm).abs() <= 1e-6 * norm.max(1e-6), "{}: norm", of.module);
    }
    let before = updates(&adapter);
    for format in Format::ALL {
        let options = SaveOptions {
            format: Some(format),
            unnamed: Unnamed::Keep,
            dtype: [None, Some(Dtype::F32)][usize::from(u.arbitrary::<bool>()?)],
            ..Default::default()
        };
        // Two layers may get one name, and some values are too large for a type.
        let Ok(bytes) = saved(&adapter, &options) else { continue };
        let again = Adapter::from_bytes("converted", bytes).unwrap_or_else(|e| panic!("{format}: {e}"));
        for layer in again.layers() {
            if let Some(update) = before.get(layer.key().as_str()) {
                near(&format!("{format}: {}", layer.key()), layer, update.data(), 0.02, ROUNDED);
            }
        }
    }
    let weighted = [adapter.at(1.0), adapter.at(-0.5)];
    for method in [&Linear as &dyn Method, &SvdMerge::new(Truncation::rank(3))] {
        let Ok(merged) = method.merge_any(&Device::cpu(), &weighted, Control::default()) else { continue };
        let (none, options) = (
            Truncation::default(),
            SaveOptions { unnamed: Unnamed::Keep, dtype: Some(Dtype::F32), ..Default::default() },
        );
        verify(method, &weighted, &merged.adapter, none, &options, 9, &Control::default())
            .expect("the merge is right");
        let bytes = saved(&merged.adapter, &options);
        if let (Ok(bytes), "linear") = (&bytes, merged.report.method.as_str()) {
            let written = Adapter::from_bytes("merged", bytes.clone()).expect("what was merged can be read");
            for of in &plain {
                let half: Vec<f64> = of.update.iter().map(|v| 0.5 * v).collect();
                let layer = written.find(&of.module).unwrap_or_else(|| panic!("`{}` is lost", of.module));
                near(&of.module, layer, &half, 1e-5, ROUNDED);
            }
        }
    }
    Ok(())
}

/// A calibration with anything wrong in it: refused, or the same again when it is written.
pub fn calibration(u: &mut Unstructured<'_>) -> Result<()> {
    let mut file = File::default();
    let (tasks, layers) = (u.int_in_range(1..=2usize)?, u.int_in_range(1..=2usize)?);
    let mut pool = Vec::new();
    for task in 0..tasks {
        let mut of = Map::new();
        for layer in 0..layers {
            let start = if u.ratio(1u8, 8)? { u.arbitrary::<u8>()? as usize } else { 2 * task };
            of.insert(
                format!("transformer_blocks_{layer}_attn_to_q"),
                json!({ "rows": [start, 2 * task + 2], "tokens": u.arbitrary::<u32>()? }),
            );
        }
        pool.push(json!({ "name": format!("t{task}"), "a_sha256": "a".repeat(64), "layers": of }));
    }
    let order = 2 * tasks;
    for layer in 0..layers {
        for task in 0..tasks {
            let n = if u.ratio(1u8, 8)? { u.int_in_range(0..=5usize)? } else { order };
            let mut gram = vec![0f64; n * n];
            for i in 0..n {
                for j in 0..n {
                    gram[i * n + j] = if i == j { 2.0 } else { 0.5 };
                }
            }
            if u.ratio(1u8, 6)? && n > 0 {
                gram[u.int_in_range(0..=n * n - 1)?] = f64::from_bits(u.arbitrary()?);
            }
            let bytes = gram.iter().flat_map(|v| v.to_le_bytes()).collect();
            file.add(&format!("transformer_blocks_{layer}_attn_to_q.gram.{task}"), "F64", &[n, n], bytes);
        }
    }
    let mut text = json!(pool).to_string();
    if u.ratio(1u8, 4)? {
        let at = u.int_in_range(0..=text.len() - 1)?;
        text.replace_range(at..=at, ["", "9", "\"", "-", "]"][u.int_in_range(0..=4usize)?]);
    }
    let metadata = json!({ "loraweld.kind": "calibration", "loraweld.version": "1", "loraweld.pool": text, "loraweld.neutral": "{}" });
    file.header.insert("__metadata__".into(), metadata);
    let bytes: std::borrow::Cow<'static, [u8]> = file.bytes().into();
    if let Ok(calibration) = Calibration::from_source("fuzz", std::sync::Arc::new(bytes)) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("again");
        // Miri knows no renaming that leaves alone what is there.
        let overwrite = cfg!(miri);
        calibration.save(&path, overwrite).expect("what was read can be written");
        let again = Calibration::open(&path).expect("what was written can be read");
        let second = folder.path().join("second");
        again.save(&second, overwrite).expect("and written again");
        assert!(std::fs::read(path).expect("it") == std::fs::read(second).expect("it"));
    }
    Ok(())
}

/// An index of shards with anything wrong in it: refused, or a bake in which every weight is the sum and all else as it was.
pub fn index(u: &mut Unstructured<'_>) -> Result<()> {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    let (mut map, mut weights) = (Map::new(), BTreeMap::new());
    let shards = u.int_in_range(1..=3usize)?;
    for shard in 0..shards {
        let name = format!("x-0000{}-of-0000{shards}.safetensors", shard + 1);
        let mut file = File::default();
        for i in 0..u.int_in_range(1..=2usize)? {
            let key = format!("transformer_blocks.{shard}.attn.{}.weight", ["to_q", "to_k"][i]);
            let (bytes, values) = values(u, "F32", 12)?;
            file.add(&key, "F32", &[4, 3], bytes);
            weights.insert(key.clone(), values);
            let said = if u.ratio(1u8, 12)? {
                ["../x", "", "y", "x-00001-of-00003.safetensors"][u.int_in_range(0..=3usize)?].to_owned()
            } else {
                name.clone()
            };
            map.insert(key, said.into());
        }
        let mut bytes = file.bytes();
        if u.ratio(1u8, 12)? {
            bytes.truncate(u.int_in_range(0..=bytes.len())?);
        }
        std::fs::write(root.join(&name), bytes).expect("a shard");
    }
    let mut text = json!({ "metadata": {}, "weight_map": map }).to_string();
    if u.ratio(1u8, 8)? {
        let at = u.int_in_range(0..=text.len() - 1)?;
        text.replace_range(at..=at, ["", "9", "\"", "}"][u.int_in_range(0..=3usize)?]);
    }
    let index = root.join("x.safetensors.index.json");
    std::fs::write(&index, text).expect("an index");
    let Ok(checkpoint) = Checkpoint::open(&index) else { return Ok(()) };
    let (a, b) = (Matrix::from_fn(1, 3, |_, j| j as f32), Matrix::from_fn(4, 1, |i, _| i as f32));
    let name = "transformer.transformer_blocks.0.attn.to_q";
    let layer = loraweld::Layer::new(name, a, b).expect("a layer");
    let adapter = Adapter::new("fuzz", Format::Peft, vec![layer]).expect("an adapter");
    let Ok(bake) = Bake::new(&checkpoint, &[adapter.at(0.5)], &BakeOptions::default()) else { return Ok(()) };
    let outside = tempfile::tempdir().expect("a folder");
    let out = outside.path().join("out");
    bake.save(&out, &Control::default()).expect("finite values are baked");
    for shard in std::fs::read_dir(&out).expect("the folder").map(|entry| entry.expect("it").path()) {
        if shard.extension().is_none_or(|e| e != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(shard).expect("a shard");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
        for (key, tensor) in file.iter() {
            let want = weights.remove(key).expect("a tensor that was there, once");
            for (e, (got, mut want)) in tensor.data().as_chunks::<4>().0.iter().zip(want).enumerate() {
                if key == "transformer_blocks.0.attn.to_q.weight" {
                    want += 0.5 * (e / 3) as f64 * (e % 3) as f64;
                }
                assert_eq!(f64::from(f32::from_le_bytes(*got)), want, "{key} {e}");
            }
        }
    }
    assert!(weights.is_empty(), "tensors were lost: {weights:?}");
    Ok(())
}
