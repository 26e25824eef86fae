//! Entries of updates, tile by tile, against plain f64, on the CPU and in every tier of the GPU.

use crate::common::fixtures::delta;
use crate::common::{Case, Random, devices, gpus, product, relative};
use loraweld::compute::ops::{BUCKETS, Check, EntryMember, EntryMerger, EntryRule, Tally, Window};
use loraweld::compute::{Batch, DeviceOptions, Select};
use loraweld::{Adapter, CoreMerge, Dare, Device, EntryMerge, Format, Layer, Matrix, Method, Rule, Ties};

const GO_ON: Check<'static> = &|| Ok(());

/// Factors whose products every arithmetic holds exactly, so that results must be equal.
fn exact(random: &mut Random, rows: usize, cols: usize) -> Matrix {
    Matrix::from_fn(rows, cols, |_, _| ((random.bits() % 17) as f64 - 8.0) / 8.0)
}

/// Of a layer: the ranks of its members, out, in.
type Shape = (&'static [usize], usize, usize);

const SHAPES: [Shape; 11] = [
    (&[1], 1, 1),
    (&[1, 3], 7, 5),
    (&[4, 2, 9], 33, 16),
    (&[17, 40], 50, 3),
    (&[2, 2, 2, 2], 1, 70),
    (&[33], 65, 47),
    // More rows than a workgroup has directions for, and tiles side by side.
    (&[8, 8], 170, 130),
    // So many ranks that a launch does not reach the last column.
    (&[512, 512], 3, 1000),
    // Members without ranks, and nothing at all.
    (&[0, 2], 5, 9),
    (&[3], 0, 4),
    (&[3], 4, 0),
];

struct Factors {
    a: Matrix,
    b: Matrix,
    members: Vec<EntryMember>,
}

impl Factors {
    fn new(random: &mut Random, &(ranks, rows, cols): &Shape) -> Self {
        let rank = ranks.iter().sum();
        let mut end = 0;
        let scales = [1.0, -0.5, 2.0, 0.25];
        let member = |(k, &rank): (usize, &usize)| {
            let first = end;
            end += rank;
            let key = [k as u32, 7];
            EntryMember { a: first, b: first, rank, scale: scales[k], threshold: 0.0, key, weight: 1.0 }
        };
        let members = ranks.iter().enumerate().map(member).collect();
        Self { a: exact(random, rank, cols), b: exact(random, rows, rank), members }
    }

    fn all(shapes: &[Shape]) -> Vec<Self> {
        let mut random = Random(31);
        shapes.iter().map(|shape| Self::new(&mut random, shape)).collect()
    }

    fn updates(&self) -> Vec<Matrix> {
        let of = |m: &EntryMember| {
            let a = Matrix::from_fn(m.rank, self.a.cols(), |k, j| self.a[(m.a + k, j)]);
            let b = Matrix::from_fn(self.b.rows(), m.rank, |i, k| m.scale * self.b[(i, m.b + k)]);
            product(&b, &a)
        };
        self.members.iter().map(of).collect()
    }

    /// M, and what lies in it.
    fn merged(&self, rule: &EntryRule) -> (Matrix, Tally) {
        let dense = self.updates();
        let (rows, cols) = (self.b.rows(), self.a.cols());
        let mut tally = Tally::default();
        let merged = Matrix::from_fn(rows, cols, |i, j| {
            let (value, sign) = rule.decided(i, j, dense.iter().map(|m| m[(i, j)]));
            tally.square += value * value;
            tally.signs += sign;
            value
        });
        (merged, tally)
    }
}

fn merger(device: &Device, factors: &[Factors], rules: Vec<EntryRule>) -> EntryMerger {
    let upload = |of: fn(&Factors) -> &Matrix| {
        let matrices: Vec<Matrix> = factors.iter().map(|factors| of(factors).clone()).collect();
        Batch::upload(device, device.factor(), &matrices).unwrap()
    };
    EntryMerger::new(upload(|f| &f.a), upload(|f| &f.b), rules).unwrap()
}

fn near(what: &str, got: &Matrix, want: &Matrix, tolerance: f64) {
    assert_eq!((got.rows(), got.cols()), (want.rows(), want.cols()), "{what}");
    let size = want.data().iter().fold(0.0f64, |max, v| max.max(v.abs()));
    for (got, want) in got.data().iter().zip(want.data()) {
        assert!((got - want).abs() <= tolerance * size, "{what}: {got} {want}");
    }
}

/// Everything that is made of layers together, against what is made of each alone.
fn check(case: &Case, factors: &[Factors], rules: &[EntryRule]) {
    let Case { name, device } = case;
    let mut random = Random(5);
    let wanted: Vec<(Matrix, Tally)> = factors.iter().zip(rules).map(|(f, rule)| f.merged(rule)).collect();
    let merger = merger(device, factors, rules.to_vec());
    let w: Vec<Matrix> =
        factors.iter().enumerate().map(|(i, f)| exact(&mut random, 1 + 11 * i, f.a.cols())).collect();
    let w_batch = Batch::upload(device, device.factor(), &w).unwrap();
    let (whole, tallies) = merger.whole(device, GO_ON).unwrap();
    let (applied, again) = merger.applied(device, &w_batch, GO_ON).unwrap();
    let squared = merger.squared(device, &w_batch, GO_ON).unwrap();
    assert_eq!(tallies.len(), again.len());
    let only = merger.tallies(device, GO_ON).unwrap();
    let [whole, applied, squared] = [whole, applied, squared].map(|batch| batch.download(device).unwrap());
    for (i, (want, tally)) in wanted.iter().enumerate() {
        let what = format!("{name}: layer {i}");
        // Only the division by a count of three rounds.
        near(&what, &whole[i], want, 1e-6);
        let once = product(&w[i], &transposed(want));
        near(&format!("{what}, applied"), &applied[i], &once, 1e-5);
        near(&format!("{what}, squared"), &squared[i], &product(&once, want), 1e-5);
        for got in [tallies[i], again[i], only[i]] {
            assert_eq!(got.signs, tally.signs, "{what}");
            assert!((got.square - tally.square).abs() <= 1e-5 * tally.square, "{what}: {got:?} {tally:?}");
        }
    }
}

fn transposed(m: &Matrix) -> Matrix {
    Matrix::from_fn(m.cols(), m.rows(), |i, j| m[(j, i)])
}

#[test]
fn entries_are_merged_by_the_rule() {
    let factors = Factors::all(&SHAPES);
    for case in devices() {
        for (elect, zero_is_minus, chance, threshold, weighted) in [
            (false, false, u32::MAX, 0.0, false),
            (true, false, u32::MAX, 0.75, false),
            (true, true, u32::MAX, 0.0, false),
            (true, false, u32::MAX, 0.25, true),
            (false, false, 1 << 31, 0.0, true),
            (true, true, 1 << 30, 0.25, true),
        ] {
            let rule = |factors: &Factors| {
                let mut members = factors.members.clone();
                for (member, weight) in members.iter_mut().zip([2.0, -1.0, 0.5, 0.0]) {
                    member.weight = if weighted { weight } else { 1.0 };
                    member.threshold = threshold;
                }
                EntryRule { members, chance, elect, zero_is_minus, scale: 0.5 }
            };
            check(&case, &factors, &factors.iter().map(rule).collect::<Vec<_>>());
        }
    }
}

/// KnOTS has one A for all members.
#[test]
fn members_may_share_rows_of_a() {
    let mut random = Random(33);
    let (a, b) = (exact(&mut random, 6, 40), exact(&mut random, 21, 12));
    let member = |k: usize| EntryMember {
        a: 0,
        b: 6 * k,
        rank: 6,
        scale: 1.0,
        threshold: 0.5,
        key: [k as u32, 1],
        weight: 1.0,
    };
    let members: Vec<_> = (0..2).map(member).collect();
    let factors = [Factors { a, b, members: members.clone() }];
    let rule = EntryRule { members, chance: u32::MAX, elect: true, zero_is_minus: false, scale: 1.0 };
    for case in devices() {
        check(&case, &factors, std::slice::from_ref(&rule));
    }
}

#[test]
fn magnitudes_are_counted_exactly() {
    let factors = Factors::all(&SHAPES);
    let rule = |factors: &Factors| EntryRule {
        members: factors.members.clone(),
        chance: u32::MAX,
        elect: true,
        zero_is_minus: false,
        scale: 1.0,
    };
    let one = 1f32.to_bits();
    for case in devices() {
        let merger = merger(&case.device, &factors, factors.iter().map(rule).collect());
        for window in [
            Window::ALL,
            Window { base: one, shift: 0 },
            Window { base: one - (1 << 23), shift: 5 },
            Window { base: u32::MAX, shift: 0 },
        ] {
            // The last member of each layer is left out, so that counts are not where members are.
            let windows: Vec<Vec<Option<Window>>> = factors
                .iter()
                .map(|f| {
                    let last = f.members.len() - 1;
                    (0..=last).map(|k| (k == 0 || k < last).then_some(window)).collect()
                })
                .collect();
            let got = merger.magnitudes(&case.device, &windows, GO_ON).unwrap();
            for (i, factors) in factors.iter().enumerate() {
                for (k, update) in factors.updates().iter().enumerate() {
                    assert_eq!(got[i][k].is_some(), windows[i][k].is_some());
                    let Some(got) = &got[i][k] else { continue };
                    let (mut buckets, mut above) = (vec![0u64; BUCKETS], 0);
                    for v in update.data() {
                        match u64::from((v.abs() as f32).to_bits()).checked_sub(u64::from(window.base)) {
                            None => {}
                            Some(bits) => match buckets.get_mut((bits >> window.shift) as usize) {
                                Some(bucket) => *bucket += 1,
                                None => above += 1,
                            },
                        }
                    }
                    assert!(got.buckets == buckets, "{}: layer {i}, member {k}, {window:?}", case.name);
                    assert_eq!(got.above, above, "{}: layer {i}, member {k}, {window:?}", case.name);
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_where_it_is() {
    for case in devices() {
        let device = &case.device;
        let upload = |rows, cols, data: &[f64]| {
            Batch::upload(device, device.factor(), &[Matrix::new(rows, cols, data.to_vec()).unwrap()])
                .unwrap()
        };
        let (a, b) = (upload(1, 3, &[1.0, f64::NAN, f64::INFINITY]), upload(1, 1, &[2.0]));
        let member =
            EntryMember { a: 0, b: 0, rank: 1, scale: 1.0, threshold: 0.0, key: [0, 7], weight: 1.0 };
        let rule = EntryRule {
            members: vec![member],
            chance: u32::MAX,
            elect: false,
            zero_is_minus: false,
            scale: 1.0,
        };
        let merger = EntryMerger::new(a, b, vec![rule]).unwrap();
        let counted = merger.magnitudes(device, &[vec![Some(Window::ALL)]], GO_ON).unwrap();
        let counted = counted[0][0].as_ref().unwrap();
        // 2, and beyond all numbers what is none: pairs make NaN of infinity.
        let bucket = |v: f32| (v.to_bits() >> 15) as usize;
        let beyond: u64 = counted.buckets[bucket(f32::INFINITY)..].iter().sum();
        assert_eq!((counted.buckets[bucket(2.0)], beyond), (1, 2), "{}", case.name);
        assert_eq!((counted.buckets.iter().sum::<u64>(), counted.above), (3, 0), "{}", case.name);
        let (whole, _) = merger.whole(device, GO_ON).unwrap();
        assert_eq!(whole.download(device).unwrap()[0].data()[0], 2.0, "{}", case.name);
    }
}

fn narrow(m: &Matrix) -> Matrix<f32> {
    m.map(|v| v as f32)
}

/// Two adapters with a layer of each of these sizes: out, in.
fn pair(sizes: &[(usize, usize)], rank: usize) -> [Adapter; 2] {
    [1, 2].map(|seed| {
        let mut random = Random(seed);
        let layers = sizes.iter().enumerate().map(|(i, &(out, input))| {
            let (a, b) = (random.matrix(rank, input, 1.0), random.matrix(out, rank, 1.0));
            Layer::new(&format!("blocks.{i}"), narrow(&a), narrow(&b)).unwrap()
        });
        Adapter::new(format!("adapter {seed}"), Format::Peft, layers.collect()).unwrap()
    })
}

fn methods() -> [(&'static str, Box<dyn Method>); 5] {
    [
        ("ties", Box::new(EntryMerge::ties(Ties::default()))),
        ("ties of the paper", Box::new(EntryMerge::ties(Ties::paper()))),
        ("dare", Box::new(EntryMerge::dare(Dare::default()))),
        ("knots", Box::new(CoreMerge::knots(Rule::Ties(Ties::default())))),
        ("knots of the paper", Box::new(CoreMerge::knots(Rule::Ties(Ties::paper())))),
    ]
}

/// How far layers are off, the worst of all.
fn worst(got: &Adapter, want: &Adapter) -> f64 {
    let off = |(got, want): (&Layer, &Layer)| relative(&delta(got), &delta(want));
    got.layers().iter().zip(want.layers()).map(off).fold(0.0, f64::max)
}

/// Layers of zeros, of equal entries, and of none but a few.
#[test]
fn entries_that_tie_are_kept_together() {
    let layer =
        |i: usize, a: Matrix, b: Matrix| Layer::new(&format!("blocks.{i}"), narrow(&a), narrow(&b)).unwrap();
    let adapter = |sign: f64| {
        let ones = |rows, cols, v: f64| Matrix::from_fn(rows, cols, |_, _| v);
        let spike = |i: usize, n: usize| Matrix::from_fn(n, 1, |k, _| f64::from(u8::from(k == i)));
        let layers = vec![
            layer(0, Matrix::zeros(2, 90), Matrix::zeros(70, 2)),
            layer(1, ones(1, 80, 0.3), ones(100, 1, sign)),
            layer(2, transposed(&spike(7, 120)), spike(3, 100)),
            layer(3, ones(1, 64, 0.5), Matrix::from_fn(64, 1, |i, _| if i % 2 == 0 { sign } else { 1.0 })),
        ];
        Adapter::new("ties", Format::Peft, layers).unwrap()
    };
    let adapters = [adapter(1.0), adapter(-1.0)];
    // Were they equal, entries would cancel, and what KnOTS makes of them depends on the signs of singular vectors.
    let weighted = [adapters[0].at(1.0), adapters[1].at(0.5)];
    for (name, method) in methods() {
        let want = method.merge_any(&Device::cpu(), &weighted, Default::default()).unwrap();
        for case in gpus() {
            let got = method.merge_any(&case.device, &weighted, Default::default()).unwrap();
            let off = worst(&got.adapter, &want.adapter);
            assert!(off <= 1e-5, "{name}, {}: {off:e}", case.name);
        }
    }
}

/// The host waits for the device a few times for all layers of a chunk, not for each of them.
#[test]
fn the_host_waits_for_chunks_and_not_for_layers() {
    let of = |layers: usize| {
        let adapters = pair(&vec![(96, 128); layers], 4);
        let weighted = [adapters[0].at(1.0), adapters[1].at(0.7)];
        methods().map(|(name, method)| {
            let device = Device::open(&DeviceOptions { select: Select::Gpu, ..Default::default() }).unwrap();
            method.merge_any(&device, &weighted, Default::default()).unwrap();
            (name, device.readbacks())
        })
    };
    if gpus().is_empty() {
        return;
    }
    for ((name, one), (_, many)) in of(1).into_iter().zip(of(24)) {
        println!("{name}: {one} for one layer, {many} for many");
        assert!(one > 0 && many <= one + 2, "{name}: {one} for one layer, {many} for many");
    }
}
