//! Random adapters, calibrations and checkpoints, whole ones and such with anything wrong in them. A few hundred of each in
//! every run; `scripts/soak.sh` goes on for as long as it is told, and `scripts/fuzz.sh` lets a fuzzer look for them.

mod bodies;

use std::time::{Duration, Instant};

use arbitrary::Unstructured;

use crate::common::Random;

fn soak(body: impl Fn(&mut Unstructured<'_>) -> arbitrary::Result<()>, least: u64) {
    let asked = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect("a number"));
    let end = Instant::now() + Duration::from_secs(asked("LORAWELD_SOAK_SECONDS").unwrap_or(0) / 3);
    let first = asked("LORAWELD_SOAK_SEED").unwrap_or(1);
    let (mut seed, mut done) = (first, 0);
    while seed < first + least || Instant::now() < end {
        let mut random = Random(seed);
        let bytes: Vec<u8> = (0..512).flat_map(|_| random.bits().to_le_bytes()).collect();
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| body(&mut Unstructured::new(&bytes))));
        match result {
            Ok(result) => done += u64::from(result.is_ok()),
            Err(_) => panic!("seed {seed}: see above; LORAWELD_SOAK_SEED={seed} begins there"),
        }
        seed += 1;
    }
    eprintln!("{} inputs, of which {done} went through", seed - first);
    assert!(done * 3 > seed - first, "{done} of {} went through", seed - first);
}

#[test]
fn whole_adapters() {
    soak(bodies::adapter, 300);
}

#[test]
fn calibrations() {
    soak(bodies::calibration, 300);
}

#[test]
fn indices_of_shards() {
    soak(bodies::index, 200);
}

/// What the fuzzer found worth keeping, once more.
#[test]
fn corpora() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    if !folder.exists() {
        eprintln!("skipped: this is not the repository");
        return;
    }
    type Body = fn(&[u8]);
    let bodies: [(&str, Body); 6] = [
        ("header", bodies::header),
        ("keys", |data| std::str::from_utf8(data).map_or((), bodies::keys)),
        ("metadata", |data| std::str::from_utf8(data).map_or((), bodies::metadata)),
        ("calibration", |data| bodies::calibration(&mut Unstructured::new(data)).unwrap_or(())),
        ("adapter", |data| bodies::adapter(&mut Unstructured::new(data)).unwrap_or(())),
        ("index", |data| bodies::index(&mut Unstructured::new(data)).unwrap_or(())),
    ];
    // Under Miri one adapter, which is merged too, takes more than four minutes, and a bake cannot copy files.
    let some = if cfg!(miri) { 4 } else { bodies.len() };
    for (name, body) in &bodies[..some] {
        let mut done = 0;
        for entry in std::fs::read_dir(folder.join(name)).into_iter().flatten() {
            let path = entry.unwrap().path();
            let is_seed = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("seed-"));
            if is_seed || !cfg!(miri) {
                eprintln!("{}", path.display());
                body(&std::fs::read(path).unwrap());
                done += 1;
            }
        }
        assert!(done > 0 || !cfg!(miri), "there is no corpus of {name}");
    }
}
