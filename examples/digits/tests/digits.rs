//! The example against references that were computed elsewhere, and what it is an example of: shared buffers.

use std::path::Path;

use burn::prelude::*;
use loraweld::fusion::{Encoder, Values, ValuesMut};
use loraweld::{
    Activations, Adapter, Calibration, Control, LayerKey, Projection, RawMatrix, Select, Source, Ssr,
    SsrOptions, wgpu,
};
use loraweld_digits::adapters::{Fused, Live, Rule, calibrate};
use loraweld_digits::bench::Bench;
use loraweld_digits::classifier::{Classifier, CleanImage, FEATURES};
use loraweld_digits::data::{CONCEPTS, Data, Images, Noise, PIXELS, Tensors, shaded};
use loraweld_digits::model::{DigitDit, Fuse, Plain, TOKENS};
use loraweld_digits::picture::Picture;
use loraweld_digits::run::sample;
use loraweld_digits::shared::{Shared, read};
use loraweld_digits::table::Effort;

struct Setting {
    shared: Shared,
    data: Data,
    model: DigitDit,
}

/// A device of its own for each test: burn gives each thread a stream.
fn setting() -> Setting {
    let shared =
        Shared::open(Select::Gpu).expect("these tests need a GPU, or a software adapter such as lavapipe");
    let data = Data::new(None);
    let model = DigitDit::load(&shared, &data).unwrap();
    Setting { shared, data, model }
}

fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |v: f64| v * v;
    let difference: f64 = got.iter().zip(want).map(|(g, w)| square(f64::from(g - w))).sum();
    (difference / want.iter().map(|w| square(f64::from(*w))).sum::<f64>()).sqrt()
}

impl Setting {
    /// The velocity at the reference's inputs.
    fn velocity(&self, file: &Tensors, fuse: &mut dyn Fuse) -> Vec<f32> {
        let (_, x) = file.get::<4>("x").unwrap();
        let (_, t) = file.get::<1>("t").unwrap();
        let (_, y) = file.get::<1>("y").unwrap();
        let labels: Vec<usize> = y.iter().map(|&y| y as usize).collect();
        let classes = self.model.classes(&labels);
        read(self.model.velocity(self.model.images(x), t, &classes, fuse).unwrap()).unwrap()
    }

    fn adapter(&self, name: &str) -> Adapter {
        self.data.adapter(name).unwrap()
    }

    fn alone(&self, adapter: &Adapter) -> Fused {
        Fused::new(&self.shared, &[adapter.at(1.0)], 64 * TOKENS, Rule::fixed(&[1.0])).unwrap()
    }

    /// A part of a buffer, read by plain wgpu.
    fn peek(&self, slice: wgpu::BufferSlice<'_>) -> Vec<f32> {
        let (device, queue) = self.shared.wgpu();
        let staging = device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: slice.size(),
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = device.create_command_encoder(&Default::default());
        encoder.copy_buffer_to_buffer(slice.buffer(), slice.offset(), &staging, 0, slice.size());
        queue.submit([encoder.finish()]);
        staging.map_async(wgpu::MapMode::Read, .., |_| ());
        self.shared.loraweld.wait().unwrap();
        bytemuck::pod_collect_to_vec(&staging.get_mapped_range(..).unwrap())
    }
}

#[test]
fn the_forward_pass_is_the_reference_with_and_without_adapters() {
    let s = setting();
    let file = s.data.file("forward").unwrap();
    let check = |name: &str, fuse: &mut dyn Fuse| {
        let (_, want) = file.get::<4>(&format!("{name}.v")).unwrap();
        let error = error(&s.velocity(&file, fuse), want);
        println!("{name}: {error:e}");
        // f32 here, f64 there.
        assert!(error <= 1e-4, "{name}: {error:e}");
    };
    check("base", &mut Plain);
    for name in ["concept_c7_rot90", "content_heart", "style_shade"] {
        check(name, &mut s.alone(&s.adapter(name)));
    }
    let (heart, shade) = (s.adapter("content_heart"), s.adapter("style_shade"));
    let mut live = Live::new(&s.shared, shade.at(0.1), heart.at(3.0)).unwrap();
    live.set(Projection::Soft(0.5), 1.0, 1.0).unwrap();
    check("content_heart+style_shade.np_soft", &mut live);

    // From recorded activations, by the published solve: statistics in f32 move it by a few thousandths.
    let adapters = CONCEPTS.map(|concept| s.adapter(concept.adapter));
    let mut calibration = Calibration::new(&adapters).unwrap();
    for (task, concept) in CONCEPTS.iter().enumerate() {
        let recorded = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/activations/traj4");
        let recorded = recorded.join(format!("{}.safetensors", concept.adapter));
        let control = Control::default();
        calibration.accumulate_file(&s.shared.loraweld, Source::Task(task), &recorded, &control).unwrap();
    }
    let weighted = adapters.each_ref().map(|adapter| adapter.at(1.0));
    let ssr = Ssr::new(&calibration).options(SsrOptions::published());
    let merged = ssr.merge(&s.shared.loraweld, &weighted).unwrap().adapter;
    let (_, want) = file.get::<4>("concept.ssr_traj4.v").unwrap();
    let error = error(&s.velocity(&file, &mut s.alone(&merged)), want);
    assert!(error <= 5e-3, "SSR: {error:e}");
}

#[test]
fn the_sampler_is_the_reference() {
    let s = setting();
    let file = s.data.file("forward").unwrap();
    let (_, noise) = file.get::<4>("sample.noise").unwrap();
    let (_, labels) = file.get::<1>("sample.y").unwrap();
    let labels: Vec<usize> = labels.iter().map(|&y| y as usize).collect();
    let drawn = read(sample(&s.model, noise, &labels, 25, &mut Plain, None).unwrap()).unwrap();
    let (_, want) = file.get::<4>("sample.base_euler25").unwrap();
    let error = error(&drawn, want);
    assert!(error <= 1e-3, "{error:e}");
}

#[test]
fn the_judges_are_the_reference() {
    let s = setting();
    let file = s.data.file("classifiers").unwrap();
    let (_, x) = file.get::<4>("check.x").unwrap();
    let check = |name: &str, got: Tensor<2>| {
        let (_, want) = file.get::<2>(&format!("check.{name}")).unwrap();
        let error = error(&read(got).unwrap(), want);
        assert!(error <= 1e-4, "{name}: {error:e}");
    };
    let judge = Classifier::load(&s.shared, &s.data, "subject_style", &["subject", "style"]).unwrap();
    let features = judge.features(s.model.images(x));
    check("subject_style.features", features.clone());
    check("subject_style.subject", judge.head(0, features.clone()));
    check("subject_style.style", judge.head(1, features));
    let judge = Classifier::load(&s.shared, &s.data, "concept", &["subject"]).unwrap();
    check("concept.subject", judge.head(0, judge.features(s.model.images(x))));
}

#[test]
fn both_read_and_write_one_buffer() {
    let s = setting();
    let values = Noise::new(1).take(48 * 128);
    let tensor: Tensor<2> = s.shared.tensor(&values, [48, 128]);
    let view = s.shared.view(&tensor).unwrap();
    s.shared.flush().unwrap();
    assert_eq!(s.peek(view.slice()), values, "what wgpu finds in the buffer is burn's tensor");

    // loraweld reads it there: its sums are those of the same values from the host.
    let (mirror, rotated) = (s.adapter("concept_c3_mirror"), s.adapter("concept_c7_rot90"));
    let layer = "transformer_blocks.0.attn.to_q";
    let merged = |x: Activations<'_>| {
        let mut calibration = Calibration::new([&mirror, &rotated]).unwrap();
        for task in 0..2 {
            calibration.accumulate(&s.shared.loraweld, task, layer, x).unwrap();
        }
        calibration.gram(&LayerKey::parse(layer), 0).unwrap().unwrap().data
    };
    let host = RawMatrix::from_f32(48, 128, &values).unwrap();
    assert_eq!(merged(view.activations()), merged(Activations::Host(host)));

    // loraweld writes there: burn finds the change in the tensor that it holds.
    let output: Tensor<2> = s.shared.tensor(&values, [48, 128]);
    let (buffer, offset) = {
        let view = s.shared.view(&output).unwrap();
        (view.slice().buffer().clone(), view.slice().offset())
    };
    s.alone(&mirror).fuse(&tensor, &mut [(layer, output.clone())]).unwrap();
    let view = s.shared.view(&output).unwrap();
    assert_eq!((view.slice().buffer(), view.slice().offset()), (&buffer, offset), "nothing was copied");
    let changed = read(output.clone()).unwrap();
    assert_eq!(s.peek(view.slice()), changed);
    let mirror =
        mirror.layers().iter().find(|l| l.name().ends_with("transformer_blocks.0.attn.to_q")).unwrap();
    let (a, b): (Vec<f32>, Vec<f32>) = (mirror.a().to_vec(), mirror.b().to_vec());
    let a: Tensor<2> = s.shared.tensor(&a, [mirror.rank, 128]);
    let b: Tensor<2> = s.shared.tensor(&b, [128, mirror.rank]);
    let update = tensor.clone().matmul(a.transpose()).matmul(b.transpose()) * mirror.scale.value as f32;
    let want = read(update + tensor.clone()).unwrap();
    assert!(error(&changed, &want) <= 1e-6 && error(&values, &want) > 1e-3);
    assert_eq!(read(tensor).unwrap(), values, "the inputs stay as they were");
}

/// The inputs of every layer reach the sums: those of a calibration by hand, through the host.
#[test]
fn a_calibration_comes_from_the_running_model() {
    /// Reads what layers get.
    struct Record(Vec<(String, Vec<f32>, usize)>);
    impl Fuse for Record {
        fn fuse(&mut self, x: &Tensor<2>, outputs: &mut [(&str, Tensor<2>)]) -> anyhow::Result<()> {
            let values = read(x.clone())?;
            self.0.extend(outputs.iter().map(|(name, _)| ((*name).to_owned(), values.clone(), x.dims()[1])));
            Ok(())
        }
    }
    let s = setting();
    let pool = [s.adapter("concept_c3_mirror"), s.adapter("concept_c1_thick")];
    let noise = Noise::new(42).take(2 * PIXELS);
    let classes = s.model.classes(&[3, 3]);
    // At strength 0 the model stays the base.
    let mut fused =
        Fused::new(&s.shared, &[pool[0].at(0.0), pool[1].at(0.0)], 2 * TOKENS, Rule::fixed(&[0.0; 2]))
            .unwrap();
    let calibration = calibrate(&mut fused, &[&pool[0], &pool[1]], |_, fused| {
        s.model.velocity(s.model.images(&noise), &[0.5], &classes, fused).map(drop)
    })
    .unwrap();
    let mut record = Record(Vec::new());
    s.model.velocity(s.model.images(&noise), &[0.5], &classes, &mut record).unwrap();
    assert_eq!(record.0.len(), 24);
    let cpu = loraweld::Device::cpu();
    let mut by_hand = Calibration::new(&pool).unwrap();
    for (layer, x, width) in &record.0 {
        let x = RawMatrix::from_f32(2 * TOKENS, *width, x).unwrap();
        by_hand.accumulate(&cpu, 1, layer, x).unwrap();
        let gram = |calibration: &Calibration| calibration.gram(&LayerKey::parse(layer), 1).unwrap().unwrap();
        let (got, want) = (gram(&calibration), gram(&by_hand));
        let narrow = |m: &loraweld::Matrix| m.data().iter().map(|v| *v as f32).collect::<Vec<_>>();
        assert!(error(&narrow(&got), &narrow(&want)) <= 2e-6, "{layer}");
    }
}

/// The way back through the encoder is that of differences.
#[test]
fn refinement_follows_the_encoders_gradient() {
    let s = setting();
    let judge = Classifier::load(&s.shared, &s.data, "subject_style", &["subject"]).unwrap();
    let x = Images::digits(&s.data).unwrap().map(shaded).of(&[3, 8], 1);
    let velocity = s.model.images(&Noise::new(2).take(2 * PIXELS));
    let weights = Noise::new(3).take(2 * FEATURES);
    let buffer = |values: &[f32]| {
        use wgpu::util::DeviceExt;
        s.shared.wgpu().0.create_buffer_init(&wgpu::util::BufferInitDescriptor {
            label: None,
            contents: bytemuck::cast_slice(values),
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        })
    };
    let (features, gradient) = (buffer(&weights), buffer(&x.pixels));
    let look = |x: &[f32]| {
        let mut encoder = CleanImage::new(&judge, s.model.images(x), velocity.clone(), 0.3);
        let unused = Values::Host(&[]);
        encoder.forward(0, unused, ValuesMut::Buffer(features.slice(..))).unwrap();
        let seen = s.peek(features.slice(..));
        (encoder, seen.iter().zip(&weights).map(|(f, w)| f64::from(f * w)).sum::<f64>())
    };
    let (mut encoder, _) = look(&x.pixels);
    let upstream = buffer(&weights);
    encoder.backward(0, Values::Buffer(upstream.slice(..)), ValuesMut::Buffer(gradient.slice(..))).unwrap();
    let gradient = s.peek(gradient.slice(..));
    let largest = gradient.iter().fold(0.0, |max: f32, g| max.max(g.abs()));
    assert!(largest > 0.0);
    for i in (0..gradient.len()).step_by(17) {
        let at = |h: f32| {
            let mut moved = x.pixels.clone();
            moved[i] += h;
            look(&moved).1
        };
        let difference = (at(1e-3) - at(-1e-3)) / 2e-3;
        // Kinks of relu and max between the two, and features of f32.
        let error = (difference - f64::from(gradient[i])).abs();
        assert!(
            error <= 0.05 * f64::from(largest),
            "{i}: {} for {difference}, largest {largest}",
            gradient[i]
        );
    }
}

#[test]
fn every_row_of_the_tables_is_there() {
    let s = setting();
    let results = Bench::new(&s.shared, &s.model, &s.data, Effort::QUICK, &|_| ()).unwrap().run().unwrap();
    let names: Vec<&str> = results.pair.iter().map(|row| row.method.as_str()).collect();
    assert_eq!(
        names,
        [
            "base",
            "heart alone",
            "shade alone",
            "average",
            "sum",
            "NP-LoRA, soft",
            "NP-LoRA, hard",
            "SSR-Merge",
            "SSR-Merge without data",
            "K-LoRA",
            "EST-LoRA",
            "selection by layer",
            "selection by token",
            "by layer, refined",
            "by token, refined",
        ]
    );
    assert!(results.pair.iter().all(|row| row.loss_subject.is_finite() && row.loss_others.is_finite()));
    // Different methods, different losses.
    let mut losses: Vec<f64> = results.pair.iter().map(|row| row.loss_subject).collect();
    losses.sort_by(f64::total_cmp);
    losses.dedup();
    assert_eq!(
        losses.len(),
        names.len() - 2,
        "all but the refined ones, which differ in their samples alone"
    );
    for (plain, refined) in [(11, 13), (12, 14)] {
        let distance = |row: usize| results.pair[row].distances.iter().sum::<f64>();
        assert!(distance(refined) < distance(plain), "refinement leads toward the references");
    }

    let names: Vec<&str> = results.concepts.iter().map(|row| row.method.as_str()).collect();
    assert_eq!(names[..2], ["base", "mirror alone"]);
    assert_eq!(
        names[5..],
        [
            "average",
            "sum",
            "SSR-Merge, published",
            "SSR-Merge",
            "SSR-Merge in the files' coordinates",
            "SSR-Merge, fair",
            "SSR-Merge, rank 4",
            "SSR-Merge, rank 4 by norm",
            "SSR-Merge without data",
            "the same in the files' coordinates",
            "sum at the best strengths",
            "sum, singular values calibrated",
            "selection by token",
            "soft, normalised"
        ]
    );
    for (k, row) in results.concepts[1..5].iter().enumerate() {
        assert_eq!(row.retention[k], 1.0, "{}", row.method);
    }
    assert!(results.concepts.iter().all(|row| row.mean_retention.is_finite()));

    for rows in &results.pictures {
        let picture = Picture::grid(rows);
        assert_eq!(picture.pixels.len(), picture.width * picture.height);
    }
    assert_eq!(results.markdown().lines().filter(|line| line.starts_with("| ")).count(), 14 + 11 + 2);
}

/// What data and methods promise, on the noise of here. Takes half an hour on a software adapter.
#[test]
#[ignore = "long on a software adapter"]
fn the_numbers_are_those_of_the_reference() {
    let s = setting();
    let results = Bench::new(&s.shared, &s.model, &s.data, Effort::FULL, &|_| ()).unwrap().run().unwrap();
    println!("{}", results.markdown());
    let pair = |method: &str| results.pair.iter().find(|row| row.method == method).unwrap();
    let token = pair("selection by token");
    assert!(token.both >= 0.95 && token.digits_kept >= 0.55, "{token:?}");
    let sum = pair("sum");
    assert!(sum.both >= 0.95 && sum.digits_kept <= 0.25, "{sum:?}");
    assert!(pair("by layer, refined").both > pair("selection by layer").both);
    // The reference calibrates in bf16 and on other noise.
    let published = results.concepts.iter().find(|row| row.method == "SSR-Merge, published").unwrap();
    for (got, want) in published.retention.iter().zip([0.82, 0.91, 0.87, 0.97]) {
        assert!((got - want).abs() <= 0.03, "{published:?}");
    }
}

#[cfg(feature = "window")]
#[test]
fn the_window_can_be_drawn_without_a_display() {
    let s = setting();
    let folder = std::env::temp_dir().join(format!("loraweld-digits-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let file = folder.join("window.png");
    let studio = loraweld_digits::window::Studio::new(s.shared, s.model, &s.data).unwrap();
    studio.screenshot(&file).unwrap();
    let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&file).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    assert_eq!((info.width, info.height), (920, 390));
    let mut shades: Vec<&[u8]> = pixels.chunks_exact(4).collect();
    shades.sort_unstable();
    shades.dedup();
    assert!(shades.len() > 100, "{} shades: the samples are missing", shades.len());
}
