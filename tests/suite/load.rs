//! Files that ask for much: refused by name before much is done, or done within the memory that is promised. Small ones in
//! every run; with `LORAWELD_LOAD` in the environment, as large as files get, with seconds and memory (`scripts/soak.sh`).

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use loraweld::merge::verify;
use loraweld::{
    Adapter, Calibration, Checkpoint, Control, Destination, Device, Linear, Method, OpenOptions, ReadAt,
    SaveOptions, Ssr, SvdMerge, Truncation, Unnamed,
};

use crate::common::files::{f32s, file_of};

/// The size of a case: as it is in every run, or as large as files get.
fn size(small: usize, large: usize) -> usize {
    if std::env::var_os("LORAWELD_LOAD").is_some() { large } else { small }
}

/// Runs a case, and tells its seconds and the most memory that was resident meanwhile, where the system tells.
fn measured<T>(name: &str, run: impl FnOnce() -> T) -> T {
    let resident = |field: &str| {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) / 1024
    };
    // The peak from here on.
    let _ = fs::write("/proc/self/clear_refs", "5");
    let (before, start, worked) = (resident("VmRSS:"), Instant::now(), processor());
    let result = run();
    let peak = resident("VmHWM:");
    eprintln!(
        "{name}: {:.2} s, {:.2} s of processors, {} MiB more than the {before} MiB before",
        start.elapsed().as_secs_f64(),
        processor() - worked,
        peak.saturating_sub(before)
    );
    result
}

/// Seconds that processors have worked for this process, which other work does not change much, where the system tells.
fn processor() -> f64 {
    let text = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may have spaces in it; the clock ticks are of 10 ms on every system that has them.
    let fields = text.rsplit_once(')').map_or("", |(_, fields)| fields).split_whitespace();
    fields.skip(11).take(2).filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

/// A file of this header and so many bytes, none of which takes room on the disk.
fn sparse(path: &Path, header: &str, bytes: u64) {
    let mut file = fs::File::create(path).unwrap();
    let length = (header.len() as u64).to_le_bytes();
    io::Write::write_all(&mut file, &length)
        .and_then(|()| io::Write::write_all(&mut file, header.as_bytes()))
        .unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
}

fn message(header: &str) -> String {
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    measured(&format!("a header of {} bytes", header.len()), || {
        Adapter::from_bytes("much", bytes).unwrap_err().to_string()
    })
}

#[test]
fn headers_that_ask_for_much_are_refused_by_name() {
    let empty = r#"{"dtype":"U8","shape":[0],"data_offsets":[0,0]}"#;
    let mut many = String::from("{");
    for i in 0..size(262_145, 1_700_000) {
        write!(many, "{}\"{i:x}\":{empty}", if i > 0 { "," } else { "" }).unwrap();
    }
    let text = message(&(many + "}"));
    assert!(text.contains("much") && text.contains("more than 262144 tensors"), "{text}");

    let long = "layer.".repeat(size(200, 11_000));
    let text = message(&format!("{{\"{long}\":{empty}}}"));
    assert!(text.contains("`layer.layer.") && text.contains("at most 1024") && text.len() < 400, "{text}");

    let ones = "1,".repeat(size(100, 40_000_000));
    let text = message(&format!("{{\"a\":{{\"dtype\":\"U8\",\"shape\":[{ones}1],\"data_offsets\":[0,1]}}}}"));
    assert!(text.contains("more than 64 dimensions"), "{text}");

    let text =
        message(&format!("{{\"__metadata__\":{{\"a\":\"{}\"}}}}", "x".repeat(size(65 << 20, 90 << 20))));
    assert!(text.contains("67108864 bytes") && text.len() < 400, "{text}");
    let mut texts = String::from("{\"__metadata__\":{");
    for i in 0..size(65_537, 7_000_000) {
        write!(texts, "{}\"{i:x}\":\"\"", if i > 0 { "," } else { "" }).unwrap();
    }
    let text = message(&(texts + "}}"));
    assert!(text.contains("65536 texts"), "{text}");

    let config = |fields: String| {
        let text = serde_json::to_string(&fields).unwrap();
        let (a, b) = (
            r#"{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}"#,
            r#"{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]}"#,
        );
        let header = format!(
            "{{\"__metadata__\":{{\"lora_adapter_metadata\":{text}}},\"x.lora_A.weight\":{a},\"x.lora_B.weight\":{b}}}"
        );
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 8]].concat();
        let name = format!("a configuration of {} bytes", fields.len());
        measured(&name, || Adapter::from_bytes("much", bytes).unwrap_err().to_string())
    };
    let patterns: Vec<String> = (0..size(8_193, 1_000_000)).map(|i| format!("\"p{i}\":1")).collect();
    let text = config(format!("{{\"alpha_pattern\":{{{}}}}}", patterns.join(",")));
    assert!(text.contains("alpha_pattern") && text.contains("at most 8192"), "{text}");
    let text = config("{\"alpha_pattern\":{\"(?:a{999}){999}\":1}}".into());
    assert!(text.contains("no regular expression"), "{text}");
    let fields = |count: usize, of: &str| {
        let fields: Vec<String> = (0..count).map(|i| format!("\"c{i}.r\":{of}")).collect();
        config(format!("{{{}}}", fields.join(",")))
    };
    let text = fields(65, "1");
    assert!(text.contains("more than 64 components"), "{text}");
    let text = fields(size(8_193, 1_000_000), "1");
    assert!(text.contains("at most 8192 fields"), "{text}");
    let text = fields(1, &format!("[1{}]", ",1".repeat(size(1_000, 6_000_000))));
    assert!(
        text.contains("`c0.r` is [1,1,") && text.contains("makes no sense") && text.len() < 400,
        "{text}"
    );
}

/// What may be written can be read: names that are too long are refused before a file is there.
#[test]
fn what_could_not_be_read_again_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    let ones = || loraweld::Matrix::from_fn(1, 1, |_, _| 1f32);
    let layer = loraweld::Layer::new(&format!("transformer.{}", "x".repeat(1020)), ones(), ones()).unwrap();
    let adapter = Adapter::new("long", loraweld::Format::Peft, vec![layer]).unwrap();
    let options = SaveOptions { unnamed: Unnamed::Keep, ..Default::default() };
    let text = adapter.save(&path, &options).unwrap_err().to_string();
    assert!(text.contains("out") && text.contains("at most 1024"), "{text}");
    let metadata = [("x".to_owned(), "y".repeat(65 << 20))].into();
    let layer = loraweld::Layer::new("transformer.x", ones(), ones()).unwrap();
    let adapter = Adapter::new("much", loraweld::Format::Peft, vec![layer]).unwrap();
    let text = adapter.with_metadata(metadata).save(&path, &options).unwrap_err().to_string();
    assert!(text.contains("out") && text.contains("67108864 bytes"), "{text}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Counts what is read of a file that is not there at all.
struct Counted {
    header: Vec<u8>,
    size: u64,
    read: AtomicU64,
}

impl ReadAt for Counted {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        for (i, byte) in buffer.iter_mut().enumerate() {
            *byte = self.header.get(offset as usize + i).copied().unwrap_or(0);
        }
        Ok(())
    }
}

#[test]
fn long_headers_are_refused_by_their_first_bytes() {
    let header = [&100_000_001u64.to_le_bytes()[..], b"{"].concat();
    let source = Arc::new(Counted { header, size: 200_000_000, read: AtomicU64::new(0) });
    let options = OpenOptions::default();
    let text = Adapter::from_source("long", source.clone(), &options).unwrap_err().to_string();
    assert!(
        text.contains("long") && text.contains("100000001 bytes") && text.contains("100000000"),
        "{text}"
    );
    assert!(source.read.load(Ordering::Relaxed) < 100);
}

const TWENTY_GB: u64 = 20_000_000_000;

/// One tensor of 20 GB: its header is all that is read of it when it is opened.
#[test]
fn large_tensors_are_opened_by_their_headers() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("large.safetensors");
    // Rank 16 of that many columns.
    let columns = (TWENTY_GB - 64) / 64;
    let header = format!(
        r#"{{"x.lora_A.weight":{{"dtype":"F32","shape":[16,{columns}],"data_offsets":[0,{a}]}},"x.lora_B.weight":{{"dtype":"F32","shape":[1,16],"data_offsets":[{a},{b}]}}}}"#,
        a = 64 * columns,
        b = 64 * columns + 64
    );
    sparse(&path, &header, 64 * columns + 64);
    let adapter = measured("opening 20 GB", || Adapter::open(&path).unwrap());
    assert_eq!(adapter.layers()[0].input() as u64, columns);
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let length = bytes.len() as u64;
    let source = Counted { header: bytes, size: length + 64 * columns + 64, read: AtomicU64::new(0) };
    let source = Arc::new(source);
    Adapter::from_source("large", source.clone(), &OpenOptions::default()).unwrap();
    assert!(source.read.load(Ordering::Relaxed) < 2 * length);
    if size(0, 1) == 1 && std::env::var_os("LORAWELD_LOAD_20GB").is_some() {
        let out = folder.path().join("out.safetensors");
        measured("converting 20 GB to 10", || {
            let options = SaveOptions {
                dtype: Some(loraweld::Dtype::F16),
                unnamed: Unnamed::Keep,
                ..Default::default()
            };
            adapter.save(&out, &options).unwrap();
        });
        assert!(fs::metadata(&out).unwrap().len() > TWENTY_GB / 2);
    }
}

/// A file with many layers that are small, of names that no model has or that one has.
fn many_layers(layers: usize, name: impl Fn(usize) -> String, seed: usize) -> Vec<u8> {
    let values = |i: usize| f32s(&[((seed + i) % 7) as f32 - 3.0, 1.0]);
    let names: Vec<[String; 2]> = (0..layers)
        .map(|i| ["lora_A", "lora_B"].map(|factor| format!("{}.{factor}.weight", name(i))))
        .collect();
    let tensors: Vec<_> = names
        .iter()
        .enumerate()
        .flat_map(|(i, [a, b])| {
            [(&a[..], "F32", &[1usize, 2][..], values(i)), (&b[..], "F32", &[2, 1][..], values(i + 1))]
        })
        .collect();
    file_of(&[], &tensors)
}

/// Merges files into one, and reads it again.
fn merged(name: &str, method: &dyn Method, files: &[Vec<u8>], layers: usize) {
    let adapters: Vec<Adapter> = measured(&format!("{name}: opening"), || {
        files.iter().map(|bytes| Adapter::from_bytes("much", bytes.clone()).unwrap()).collect()
    });
    let weighted: Vec<_> = adapters.iter().map(|adapter| adapter.at(0.5)).collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out");
    let options = SaveOptions { unnamed: Unnamed::Keep, ..Default::default() };
    let truncation = Truncation::default();
    let to = Destination { path: &path, sink: None, options: &options, truncation };
    measured(&format!("{name}: merging"), || {
        method.merge_into(&Device::cpu(), &weighted, &to, Control::default()).unwrap()
    });
    let written = measured(&format!("{name}: reading again"), || Adapter::open(&path).unwrap());
    assert_eq!(written.layers().len(), layers, "{name}");
    verify(method, &weighted, &written, truncation, &options, 4, &Control::default()).unwrap();
}

#[test]
fn files_of_very_many_layers_are_merged() {
    let layers = size(2_000, 100_000);
    let known =
        |i: usize| format!("transformer.transformer_blocks.{}.attn.to_{}", i / 3, ["q", "k", "v"][i % 3]);
    let unknown = |i: usize| format!("base_model.model.part{}.piece{}.linear", i / 100, i % 100);
    let files = [many_layers(layers, known, 1), many_layers(layers, known, 2)];
    merged(&format!("{layers} layers, linear"), &Linear, &files, layers);
    merged(&format!("{layers} layers, svd"), &SvdMerge::new(Truncation::rank(1)), &files, layers);
    let files = [many_layers(layers, unknown, 1), many_layers(layers, unknown, 2)];
    merged(&format!("{layers} unknown layers, linear"), &Linear, &files, layers);
}

/// Layers of one shape, of values that no two adapters share.
fn wide(layers: usize, rank: usize, width: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut values = |n: usize| {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        f32s(&(0..n).map(|_| next()).collect::<Vec<_>>())
    };
    let name =
        |i: usize, factor: &str| format!("transformer.transformer_blocks.{i}.attn.to_q.{factor}.weight");
    let names: Vec<[String; 2]> = (0..layers).map(|i| [name(i, "lora_A"), name(i, "lora_B")]).collect();
    let mut tensors = Vec::new();
    for [a, b] in &names {
        tensors.push((&a[..], "F32", [rank, width], values(rank * width)));
        tensors.push((&b[..], "F32", [width, rank], values(rank * width)));
    }
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (*name, *dtype, &shape[..], bytes.clone()))
        .collect();
    file_of(&[], &tensors)
}

#[test]
fn sixty_four_adapters_are_merged_at_once() {
    let (count, width) = (64, size(48, 1024));
    let files: Vec<Vec<u8>> = (0..count).map(|seed| wide(2, size(2, 16), width, seed)).collect();
    merged("64 adapters, linear", &Linear, &files, 2);
    merged("64 adapters, svd", &SvdMerge::new(Truncation::rank(8)), &files, 2);
    merged("64 adapters, ssr", &Ssr::data_free(), &files, 2);
}

#[test]
fn very_high_ranks_are_merged() {
    let (rank, width) = (size(96, 4096), size(128, 4096));
    let files = [1, 2].map(|seed| wide(1, rank, width, seed));
    merged(&format!("rank {rank}, linear"), &Linear, &files, 1);
    merged(&format!("rank {rank}, svd"), &SvdMerge::new(Truncation::rank(8)), &files, 1);
}

#[test]
fn very_many_shards_of_activations_are_added() {
    let shards = size(100, 10_000);
    let folder = tempfile::tempdir().unwrap();
    let adapters = [1, 2].map(|seed| Adapter::from_bytes("much", wide(2, 4, 64, seed)).unwrap());
    let name = |i: usize| format!("transformer_blocks.{i}.attn.to_q");
    let values = |i: usize| f32s(&(0..3 * 64).map(|k| ((i + 3 * k) % 13) as f32 - 6.0).collect::<Vec<_>>());
    for i in 0..shards {
        let names = [name(0), name(1)];
        let tensors =
            [(&names[0][..], "F32", &[3, 64][..], values(i)), (&names[1], "F32", &[3, 64], values(i + 1))];
        fs::write(folder.path().join(format!("{i:05}.safetensors")), file_of(&[], &tensors)).unwrap();
    }
    let mut calibration = Calibration::new(&adapters).unwrap();
    let device = Device::cpu();
    measured(&format!("{shards} shards of activations"), || {
        for task in 0..2 {
            let source = loraweld::Source::Task(task);
            calibration.accumulate_path(&device, source, folder.path(), &Control::default()).unwrap();
        }
    });
    let key = calibration.layers().next().unwrap().clone();
    assert_eq!(calibration.tokens(&key, 0), 3 * shards as u64);
}

/// A pool whose layers times tasks are more than any, in a file that is short.
#[test]
fn calibrations_that_ask_for_much_are_refused() {
    let tasks = 1_100;
    let layer = |i: usize| format!("\"transformer_blocks_{i}_attn_to_q\":{{\"rows\":[0,0],\"tokens\":0}}");
    let layers: Vec<String> = (0..1_000).map(layer).collect();
    let task = |i: usize| {
        let layers = if i == 0 { layers.join(",") } else { String::new() };
        format!("{{\"name\":\"t{i}\",\"a_sha256\":\"{}\",\"layers\":{{{layers}}}}}", "a".repeat(64))
    };
    let pool = format!("[{}]", (0..tasks).map(task).collect::<Vec<_>>().join(","));
    let metadata = [
        ("loraweld.kind", "calibration"),
        ("loraweld.version", "1"),
        ("loraweld.pool", &pool),
        ("loraweld.neutral", "{}"),
    ];
    let bytes: std::borrow::Cow<'static, [u8]> = file_of(&metadata, &[]).into();
    let text = Calibration::from_source("much", Arc::new(bytes)).err().unwrap().to_string();
    assert!(text.contains("1000 layers of 1100 tasks") && text.contains("1048576"), "{text}");
}

/// An index, a configuration: what is read as a whole may not be of any length.
#[test]
fn texts_beside_a_model_are_refused_by_their_length() {
    let folder = tempfile::tempdir().unwrap();
    let index = folder.path().join("x.safetensors.index.json");
    sparse(&index, "{", TWENTY_GB);
    let text = Checkpoint::open(&index).err().unwrap().to_string();
    assert!(text.contains("x.safetensors.index.json") && text.contains("100000000 bytes"), "{text}");
    let peft = folder.path().join("peft");
    fs::create_dir(&peft).unwrap();
    fs::write(peft.join("adapter_model.safetensors"), many_layers(1, |_| "x".into(), 1)).unwrap();
    sparse(&peft.join("adapter_config.json"), "{", TWENTY_GB);
    let text = Adapter::open(&peft).unwrap_err().to_string();
    assert!(text.contains("adapter_config.json") && text.contains("100000000 bytes"), "{text}");
    // What never ends.
    #[cfg(target_os = "linux")]
    {
        fs::remove_file(&index).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &index).unwrap();
        let text = Checkpoint::open(&index).err().unwrap().to_string();
        assert!(text.contains("100000000 bytes"), "{text}");
    }
}
