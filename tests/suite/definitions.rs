//! The baselines as their authors and PEFT define them, against those definitions in dense f64, on the CPU and in every
//! tier of the GPU.

use crate::common::fixtures::{adapter, delta, pool, wide};
use crate::common::{Case, Random, devices, outer, product, relative, stack, svd};
use loraweld::{
    Action, Adapter, Alone, Bases, CoreMerge, Dare, Device, Elect, EntryMerge, Format, Iso, Layer, LayerKey,
    Matrix, Merged, Plan, Rule, Scope, Ties, Tsv, Weighted, ZeroSum,
};

fn narrow(m: &Matrix) -> Matrix<f32> {
    Matrix::from_fn(m.rows(), m.cols(), |i, j| m[(i, j)] as f32)
}

/// An adapter of layers `blocks.<name>`.
fn made(name: &str, layers: &[(usize, Matrix, Matrix)]) -> Adapter {
    let layer = |(i, a, b): &(usize, Matrix, Matrix)| {
        Layer::new(&format!("blocks.{i}"), narrow(a), narrow(b)).unwrap()
    };
    Adapter::new(name, Format::Peft, layers.iter().map(layer).collect()).unwrap()
}

/// Widths (in, out) of the made layers, which are of very different sizes.
const WIDTHS: [(usize, usize); 4] = [(24, 31), (7, 40), (33, 12), (5, 6)];

/// Three adapters, of ranks 3, 2 and 4, of which each lacks a layer, and one has a layer alone.
fn random(seed: u64) -> Vec<Adapter> {
    let mut random = Random(seed);
    let mut one = |rank: usize, layers: &[usize]| {
        let factors = |&i: &usize| {
            let (input, output) = WIDTHS[i];
            // Layers of different strength, so that the file's ranking is not the layers'.
            let scale = [1.0, 0.25, 2.0, 1e-3][i];
            (i, random.matrix(rank, input, scale), random.matrix(output, rank, scale))
        };
        made(&format!("rank-{rank}"), &layers.iter().map(factors).collect::<Vec<_>>())
    };
    vec![one(3, &[0, 1, 2, 3]), one(2, &[0, 2]), one(4, &[0, 1])]
}

/// Adapters whose entries are few small numbers that every arithmetic holds, so that many are as large as others, and many
/// sums are zero.
fn coarse() -> Vec<Adapter> {
    let mut random = Random(9);
    let mut one = |layers: &[usize]| {
        let mut small = |rows, cols| Matrix::from_fn(rows, cols, |_, _| (random.bits() % 5) as f64 - 2.5);
        let factors = |&i: &usize| (i, small(1, WIDTHS[i].0), small(WIDTHS[i].1, 1));
        made("coarse", &layers.iter().map(factors).collect::<Vec<_>>())
    };
    vec![one(&[0, 1, 2]), one(&[0, 1, 2, 3]), one(&[1, 2])]
}

/// The trained adapters, of which one lacks the first layers, so that others are alone there.
fn trained() -> Vec<Adapter> {
    let pair = [adapter("content_heart"), adapter("style_shade")];
    let rest = pair[1].layers()[2..].to_vec();
    vec![pair[0].clone(), Adapter::new("style", pair[1].format(), rest).unwrap()]
}

/// The updates of every layer in dense f64, with scales but without strengths; `None` where an adapter lacks it.
struct File {
    keys: Vec<LayerKey>,
    layers: Vec<Vec<Option<Matrix>>>,
    strengths: Vec<f64>,
}

impl File {
    fn of(adapters: &[Weighted<'_>]) -> Self {
        let plan = Plan::new(adapters).unwrap();
        let keys: Vec<LayerKey> = plan.layers().iter().map(|layer| layer.key.clone()).collect();
        let layer = |key| adapters.iter().map(|w| w.adapter.layer(key).map(delta)).collect();
        let layers = keys.iter().map(layer).collect();
        Self { keys, layers, strengths: adapters.iter().map(|w| w.strength).collect() }
    }

    /// As vectors, entries of zero where an adapter lacks a layer, strengths in them or not.
    fn vectors(&self, weighted: bool) -> Vec<Vec<Vec<f64>>> {
        let vectors = |updates: &Vec<Option<Matrix>>| {
            let size = updates.iter().flatten().next().unwrap().data().len();
            let vector = |(update, strength): (&Option<Matrix>, &f64)| match update {
                Some(m) => m.data().iter().map(|v| if weighted { v * strength } else { *v }).collect(),
                None => vec![0.0; size],
            };
            updates.iter().zip(&self.strengths).map(vector).collect()
        };
        self.layers.iter().map(vectors).collect()
    }

    /// The only adapter that adds anything to a layer.
    fn lone(&self, layer: usize) -> Option<usize> {
        let acts = |k: &usize| self.layers[layer][*k].is_some() && self.strengths[*k] != 0.0;
        let acting: Vec<usize> = (0..self.strengths.len()).filter(acts).collect();
        (acting.len() == 1).then(|| acting[0])
    }

    fn shaped(&self, layer: usize, data: Vec<f64>) -> Matrix {
        let m = self.layers[layer].iter().flatten().next().unwrap();
        Matrix::new(m.rows(), m.cols(), data).unwrap()
    }
}

/// The `count`-th largest magnitude.
fn nth(values: impl Iterator<Item = f64>, count: usize) -> f64 {
    // As f32, so that entries that are equal but for rounding stay so.
    let mut sizes: Vec<f64> = values.map(|v| f64::from(v.abs() as f32)).collect();
    sizes.sort_by(|x, y| y.total_cmp(x));
    sizes[count.min(sizes.len()) - 1]
}

fn sign(v: f64) -> f64 {
    if v == 0.0 { 0.0 } else { v.signum() }
}

/// Elects signs over layers of vectors, `trimmed[layer][adapter]`, and averages what agrees.
fn elected(
    trimmed: &[Vec<Vec<f64>>],
    weights: &[f64],
    zero: ZeroSum,
    majority_in_file: bool,
) -> Vec<Vec<f64>> {
    let sums: Vec<Vec<f64>> = trimmed
        .iter()
        .map(|layer| (0..layer[0].len()).map(|at| layer.iter().map(|v| v[at]).sum()).collect())
        .collect();
    let total = |sums: &Vec<f64>| sums.iter().map(|v| sign(*v)).sum::<f64>();
    let of_file = sums.iter().map(total).sum::<f64>();
    let entry = |layer: &Vec<Vec<f64>>, sums: &Vec<f64>, majority: f64, at: usize| {
        let elected = match zero {
            _ if sums[at] != 0.0 => sign(sums[at]),
            ZeroSum::Plus => 1.0,
            ZeroSum::Majority => sign(majority),
        };
        // Of no sign at all, the authors' code takes what is below zero.
        let agrees = |v: f64| if elected > 0.0 { v > 0.0 } else { v < 0.0 };
        let (mut mean, mut count) = (0.0, 0);
        for (vector, weight) in layer.iter().zip(weights) {
            if agrees(vector[at]) {
                mean += weight * vector[at];
                count += 1;
            }
        }
        mean / f64::from(count.max(1))
    };
    trimmed
        .iter()
        .zip(&sums)
        .map(|(layer, sums)| {
            let majority = if majority_in_file { of_file } else { total(sums) };
            (0..sums.len()).map(|at| entry(layer, sums, majority, at)).collect()
        })
        .collect()
}

/// TIES of vectors, `vectors[layer][adapter]`, of which the first `counts[layer]` entries of each count.
fn ties(vectors: &[Vec<Vec<f64>>], counts: &[usize], weights: &[f64], options: &Ties) -> Vec<Vec<f64>> {
    let kept =
        |n: usize| (((options.density * n as f64) as usize).max(1) + usize::from(options.one_more)).min(n);
    let trim = |vector: &[f64], threshold: f64| -> Vec<f64> {
        let large = |v: &f64| f64::from(v.abs() as f32) >= threshold;
        vector.iter().map(|v| if large(v) { *v } else { 0.0 }).collect()
    };
    let in_file = options.scope == Scope::File;
    let of_file: Vec<f64> = (0..weights.len())
        .map(|k| nth(vectors.iter().flat_map(|layer| layer[k].iter().copied()), kept(counts.iter().sum())))
        .collect();
    let trimmed: Vec<Vec<Vec<f64>>> = vectors
        .iter()
        .zip(counts)
        .map(|(layer, &n)| {
            let threshold = |k: usize| match in_file {
                true => of_file[k],
                false => nth(layer[k].iter().copied(), kept(n)),
            };
            layer.iter().enumerate().map(|(k, vector)| trim(vector, threshold(k))).collect()
        })
        .collect();
    let mut merged = elected(&trimmed, weights, options.zero, in_file);
    merged.iter_mut().flatten().for_each(|v| *v *= options.lambda);
    merged
}

/// TIES of whole updates.
fn dense_ties(file: &File, options: &Ties) -> Vec<Matrix> {
    let weighted = options.elect == Elect::Weighted;
    let vectors = file.vectors(weighted);
    let weights = if weighted { vec![1.0; file.strengths.len()] } else { file.strengths.clone() };
    let counts: Vec<usize> = vectors.iter().map(|layer| layer[0].len()).collect();
    let merged = ties(&vectors, &counts, &weights, options);
    let layer = |(i, merged): (usize, Vec<f64>)| match file.lone(i) {
        Some(k) if options.alone == Alone::Keep => {
            scaled(file.layers[i][k].as_ref().unwrap(), file.strengths[k])
        }
        _ => file.shaped(i, merged),
    };
    merged.into_iter().enumerate().map(layer).collect()
}

fn scaled(m: &Matrix, scale: f64) -> Matrix {
    Matrix::from_fn(m.rows(), m.cols(), |i, j| scale * m[(i, j)])
}

/// The largest relative difference over all layers.
fn worst(merged: &Merged, file: &File, want: &[Matrix]) -> f64 {
    let of = |(key, want): (&LayerKey, &Matrix)| relative(&delta(merged.adapter.layer(key).unwrap()), want);
    assert_eq!(merged.adapter.layers().len(), want.len());
    file.keys.iter().zip(want).map(of).fold(0.0, f64::max)
}

/// What a device's products hold: those of f64, or of f32 factors rounded to f32 on their way.
fn tolerance(case: &Case) -> f64 {
    if case.device.is_gpu() { 1e-5 } else { 1e-6 }
}

fn at<'a>(adapters: &'a [Adapter], strengths: &[f64]) -> Vec<Weighted<'a>> {
    adapters.iter().zip(strengths).map(|(adapter, &s)| adapter.at(s)).collect()
}

#[test]
fn ties_of_the_paper_and_of_peft() {
    let devices = devices();
    for (name, adapters) in [("random", random(3)), ("coarse", coarse())] {
        for strengths in [[-1.0, -1.0, -1.0], [0.5, -1.0, 2.0], [1.0, 0.0, 1.0]] {
            let weighted = at(&adapters, &strengths);
            let file = File::of(&weighted);
            for (whose, ties) in [("paper", Ties::paper()), ("peft", Ties::peft())] {
                for density in [0.2, 0.6, 1.0] {
                    let ties = Ties { density, lambda: 1.5, ..ties };
                    let want = dense_ties(&file, &ties);
                    for case in &devices {
                        let merged = EntryMerge::ties(ties).rank(50).merge(&case.device, &weighted).unwrap();
                        let error = worst(&merged, &file, &want);
                        let what = format!("{name}, {whose}, {density}, {strengths:?}, {}", case.name);
                        assert!(error <= tolerance(case), "{what}: {error:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn ties_of_the_paper_and_of_peft_on_trained_adapters() {
    for (name, adapters, strengths) in
        [("pair", trained(), vec![1.0, 0.7]), ("pool", pool(), vec![1.0, 0.5, 1.0, 0.8])]
    {
        let weighted = at(&adapters, &strengths);
        let file = File::of(&weighted);
        for (whose, ties) in [("paper", Ties::paper()), ("peft", Ties::peft())] {
            let merged = EntryMerge::ties(ties).rank(512).merge(&Device::cpu(), &weighted).unwrap();
            let error = worst(&merged, &file, &dense_ties(&file, &ties));
            println!("ties, {whose}, {name}: {error:e}");
            assert!(error <= 1e-6, "{whose}, {name}: {error:e}");
            // It is something else than the default.
            let merged =
                EntryMerge::ties(Ties::default()).rank(512).merge(&Device::cpu(), &weighted).unwrap();
            assert!(worst(&merged, &file, &dense_ties(&file, &ties)) >= 0.1, "{whose}, {name}");
        }
    }
}

#[test]
fn each_option_of_ties_is_its_own() {
    let (random, coarse) = (random(4), coarse());
    // Most sums are below zero.
    for (adapters, strengths) in [(&random, [-0.5, -1.0, -2.0]), (&coarse, [-1.0; 3])] {
        let weighted = at(adapters, &strengths);
        let file = File::of(&weighted);
        let mut results: Vec<Vec<Matrix>> = Vec::new();
        for scope in [Scope::Layer, Scope::File] {
            for one_more in [false, true] {
                for elect in [Elect::Weighted, Elect::Unweighted] {
                    for zero in [ZeroSum::Plus, ZeroSum::Majority] {
                        for alone in [Alone::Keep, Alone::Merge] {
                            let ties =
                                Ties { density: 0.3, lambda: 1.0, scope, one_more, elect, zero, alone };
                            let want = dense_ties(&file, &ties);
                            let merged =
                                EntryMerge::ties(ties).rank(50).merge(&Device::cpu(), &weighted).unwrap();
                            let error = worst(&merged, &file, &want);
                            assert!(error <= 1e-6, "{ties:?}: {error:e}");
                            results.push(want);
                        }
                    }
                }
            }
        }
        // The reference sees every option: each pair that differs in one bit differs, in one kind of adapters at least.
        let differ = |bit: usize| (0..32).any(|i| results[i].iter().ne(results[i ^ (1 << bit)].iter()));
        let seen: Vec<bool> = (0..5).map(differ).collect();
        match std::ptr::eq(adapters, &coarse) {
            true => assert!(seen[1], "coarse adapters have sums of zero: {seen:?}"),
            false => assert!(seen[0] && seen[2] && seen[3] && seen[4], "{seen:?}"),
        }
    }
}

/// Which entries DARE keeps, `[layer][adapter][entry]`: adapters whose entries are all 2^k show it.
fn masks(device: &Device, adapters: &[Weighted<'_>], density: f64, seed: u64) -> Vec<Vec<Vec<bool>>> {
    let constant = |(k, w): (usize, &Weighted<'_>)| {
        let layer = |layer: &Layer| {
            let (a, b) =
                (Matrix::from_fn(1, layer.input(), |_, _| 1.0f32), (layer.output(), (1 << k) as f32));
            Layer::new(layer.module(), a, Matrix::from_fn(b.0, 1, |_, _| b.1)).unwrap()
        };
        let layers = w.adapter.layers().iter().map(layer).collect();
        Adapter::new(format!("constant-{k}"), Format::Peft, layers).unwrap()
    };
    let constants: Vec<Adapter> = adapters.iter().enumerate().map(constant).collect();
    let weighted: Vec<_> =
        constants.iter().zip(adapters).map(|(c, w)| c.at(f64::from(u8::from(w.strength != 0.0)))).collect();
    let dare = Dare { density, seed, ..Dare::paper() };
    let merged = EntryMerge::dare(dare).rank(512).merge(device, &weighted).unwrap();
    let layer = |layer: &Layer| {
        let code = |v: f64| (v * density).round() as usize;
        let dense = delta(layer);
        (0..adapters.len()).map(|k| dense.data().iter().map(|&v| code(v) >> k & 1 == 1).collect()).collect()
    };
    merged.adapter.layers().iter().map(layer).collect()
}

#[test]
fn dare_of_the_paper_and_of_peft() {
    // The CPU comes first; trained adapters are merged there alone.
    let devices = devices();
    let (random, trained) = (random(5), trained());
    for (name, adapters, strengths) in [
        ("random", &random, vec![1.0, 1.0, 1.0]),
        ("random", &random, vec![0.5, -1.0, 2.0]),
        ("random, one at strength 0", &random, vec![1.0, 0.0, 0.0]),
        ("trained", &trained, vec![1.0, 0.7]),
    ] {
        let weighted = at(adapters, &strengths);
        let file = File::of(&weighted);
        let density = 0.4;
        let masks = masks(&Device::cpu(), &weighted, density, 3);
        let dropped = |elect: Elect| -> Vec<Vec<Vec<f64>>> {
            let mut vectors = file.vectors(elect == Elect::Weighted);
            for (layer, masks) in vectors.iter_mut().zip(&masks) {
                for (vector, mask) in layer.iter_mut().zip(masks) {
                    vector
                        .iter_mut()
                        .zip(mask)
                        .for_each(|(v, kept)| *v *= f64::from(u8::from(*kept)) / density);
                }
            }
            vectors
        };
        let sum: Vec<Vec<f64>> = dropped(Elect::Weighted)
            .iter()
            .map(|layer| (0..layer[0].len()).map(|at| layer.iter().map(|v| v[at]).sum()).collect())
            .collect();
        let by = |elect: Elect, zero: ZeroSum| {
            let weights = match elect {
                Elect::Weighted => vec![1.0; strengths.len()],
                Elect::Unweighted => strengths.clone(),
            };
            elected(&dropped(elect), &weights, zero, true)
        };
        let paper = Dare { density, seed: 3, ..Dare::paper() };
        let peft = Dare { density, seed: 3, ..Dare::peft() };
        let mut cases = vec![
            ("paper", paper, sum.clone()),
            ("peft", peft, sum),
            ("paper, ties", Dare { ties: true, ..paper }, by(Elect::Weighted, ZeroSum::Majority)),
        ];
        // One that votes at strength 0 has a place of its own, and so masks of its own.
        if !strengths.contains(&0.0) {
            let want = by(Elect::Unweighted, ZeroSum::Plus);
            cases.push(("peft, ties", Dare { ties: true, ..peft }, want));
        }
        for (whose, dare, want) in cases {
            let want: Vec<Matrix> =
                want.into_iter().enumerate().map(|(i, data)| file.shaped(i, data)).collect();
            let count = if name == "trained" { 1 } else { devices.len() };
            for case in &devices[..count] {
                let merged = EntryMerge::dare(dare).rank(512).merge(&case.device, &weighted).unwrap();
                let error = worst(&merged, &file, &want);
                if name == "trained" {
                    println!("dare, {whose}: {error:e}");
                }
                assert!(error <= tolerance(case), "{name}, {whose}, {}: {error:e}", case.name);
            }
        }
        // By default, what is alone passes through.
        let keep = Dare { alone: Alone::Keep, ..paper };
        let merged = EntryMerge::dare(keep).rank(512).merge(&Device::cpu(), &weighted).unwrap();
        let lone: Vec<usize> = (0..file.keys.len()).filter(|&i| file.lone(i).is_some()).collect();
        assert!(!lone.is_empty());
        for i in lone {
            let k = file.lone(i).unwrap();
            assert_eq!(merged.report.layers[i].action, Action::PassedThrough);
            let want = scaled(file.layers[i][k].as_ref().unwrap(), strengths[k]);
            assert!(relative(&delta(&merged.adapter.layers()[i]), &want) <= 1e-6);
        }
    }
}

/// The updates of one layer with strengths, zeros where an adapter lacks it.
fn updates(file: &File, layer: usize) -> Vec<Matrix> {
    let update = |(m, s): (&Option<Matrix>, &f64)| match m {
        Some(m) => scaled(m, *s),
        None => {
            file.shaped(layer, vec![0.0; file.layers[layer].iter().flatten().next().unwrap().data().len()])
        }
    };
    file.layers[layer].iter().zip(&file.strengths).map(update).collect()
}

/// KnOTS with TIES over the whole file: `[ΔW_1 … ΔW_K] = U·[Σ·V_1 … Σ·V_K]`, the entries of all Σ·V_k of all layers
/// in one vector for each adapter.
fn knots_paper(file: &File, options: &Ties) -> Vec<Matrix> {
    let bases: Vec<Matrix> = (0..file.keys.len())
        .map(|i| {
            let transposed: Vec<_> = updates(file, i).iter().map(Matrix::transposed).collect();
            svd(&stack(&transposed)).2
        })
        .collect();
    let vectors: Vec<Vec<Vec<f64>>> = bases
        .iter()
        .enumerate()
        .map(|(i, u)| updates(file, i).iter().map(|m| product(u, m).into_data()).collect())
        .collect();
    let counts: Vec<usize> = vectors.iter().map(|layer| layer[0].len()).collect();
    let merged = ties(&vectors, &counts, &vec![1.0; file.strengths.len()], options);
    bases
        .iter()
        .zip(merged)
        .map(|(u, data)| {
            product(&u.transposed(), &Matrix::new(u.rows(), data.len() / u.rows(), data).unwrap())
        })
        .collect()
}

/// Core Space with TIES layer by layer, in the singular vectors of the stacked A and of the stacked B.
fn core_paper(adapters: &[Weighted<'_>], file: &File, options: &Ties) -> Vec<Matrix> {
    let layer = |(i, key): (usize, &LayerKey)| {
        let own: Vec<(&Layer, f64)> =
            adapters.iter().filter_map(|w| Some((w.adapter.layer(key)?, w.strength))).collect();
        let v = svd(&stack(&own.iter().map(|(l, _)| wide(l.a())).collect::<Vec<_>>())).2;
        let b = |(l, s): &(&Layer, f64)| scaled(&wide(l.b()).transposed(), l.scale().value * s);
        let u = svd(&stack(&own.iter().map(b).collect::<Vec<_>>())).2;
        let core = |m: &Matrix| product(&product(&u, m), &v.transposed()).into_data();
        let vectors = vec![updates(file, i).iter().map(core).collect::<Vec<_>>()];
        let rank: usize = own.iter().map(|(l, _)| l.rank()).sum();
        let (output, input) = (own[0].0.output(), own[0].0.input());
        let counts = [rank.min(output) * rank.min(input)];
        let data = ties(&vectors, &counts, &vec![1.0; file.strengths.len()], options).remove(0);
        product(&u.transposed(), &product(&Matrix::new(u.rows(), v.rows(), data).unwrap(), &v))
    };
    file.keys.iter().enumerate().map(layer).collect()
}

#[test]
fn knots_and_core_space_of_the_paper() {
    // The CPU comes first; trained adapters are merged there alone.
    let devices = devices();
    let (random, trained, pool) = (random(6), trained(), pool());
    for (name, adapters, strengths) in [
        ("random", &random, vec![1.0, -0.7, 1.2]),
        ("pair", &trained, vec![1.0, 1.0]),
        ("pool", &pool, vec![1.0; 4]),
    ] {
        let weighted = at(adapters, &strengths);
        let file = File::of(&weighted);
        for density in [0.2, 0.7] {
            let paper = Ties { density, ..Ties::paper() };
            let by_layer = Ties { scope: Scope::Layer, ..paper };
            let knots = CoreMerge::knots(Rule::Ties(paper));
            let core = CoreMerge::core(Rule::Ties(by_layer)).bases(Bases::Factors);
            for (method, merge, want) in [
                ("knots", knots, knots_paper(&file, &paper)),
                ("core", core, core_paper(&weighted, &file, &by_layer)),
            ] {
                let count = if name == "random" { devices.len() } else { 1 };
                for case in &devices[..count] {
                    let merged = merge.merge(&case.device, &weighted).unwrap();
                    let error = worst(&merged, &file, &want);
                    if name != "random" {
                        println!("{method}, paper, {name}, {density}: {error:e}");
                    }
                    let what = format!("{method}, {name}, {density}, {}", case.name);
                    assert!(error <= tolerance(case), "{what}: {error:e}");
                }
            }
        }
    }
    // What `core_paper` sets is that.
    let weighted = at(&trained, &[1.0, 1.0]);
    let file = File::of(&weighted);
    let merged = CoreMerge::core_paper().merge(&Device::cpu(), &weighted).unwrap();
    let want = core_paper(&weighted, &file, &Ties { scope: Scope::Layer, ..Ties::paper() });
    assert!(worst(&merged, &file, &want) <= 1e-6);
}

#[test]
fn rules_on_entries_take_strengths_after_the_election_in_cores_as_well() {
    let devices = devices();
    let adapters = random(8);
    // One votes at strength 0, on a layer that another has besides.
    for strengths in [[0.5, -1.0, 2.0], [1.0, 0.0, 1.0]] {
        let weighted = at(&adapters, &strengths);
        let plain = at(&adapters, &[1.0; 3]);
        let (file, unweighted) = (File::of(&weighted), File::of(&plain));
        let options = Ties { density: 0.4, elect: Elect::Unweighted, alone: Alone::Merge, ..Ties::paper() };
        let bases: Vec<Matrix> = (0..file.keys.len())
            .map(|i| {
                let transposed: Vec<_> = updates(&unweighted, i).iter().map(Matrix::transposed).collect();
                svd(&stack(&transposed)).2
            })
            .collect();
        let vectors: Vec<Vec<Vec<f64>>> = bases
            .iter()
            .enumerate()
            .map(|(i, u)| updates(&unweighted, i).iter().map(|m| product(u, m).into_data()).collect())
            .collect();
        let counts: Vec<usize> = vectors.iter().map(|layer| layer[0].len()).collect();
        let want: Vec<Matrix> = ties(&vectors, &counts, &strengths, &options)
            .into_iter()
            .zip(&bases)
            .map(|(data, u)| {
                product(&u.transposed(), &Matrix::new(u.rows(), data.len() / u.rows(), data).unwrap())
            })
            .collect();
        for case in &devices {
            let merged = CoreMerge::knots(Rule::Ties(options)).merge(&case.device, &weighted).unwrap();
            let error = worst(&merged, &file, &want);
            assert!(error <= tolerance(case), "{strengths:?}, {}: {error:e}", case.name);
        }
    }
}

#[test]
fn tsv_and_iso_of_the_paper() {
    // The CPU comes first; trained adapters are merged there alone.
    let devices = devices();
    let (random, trained, pool) = (random(7), trained(), pool());
    let polar = |rows: &Matrix| {
        let (u, s, v) = svd(rows);
        outer(&u, &vec![1.0; s.len()], &v)
    };
    for (name, adapters, strengths) in [
        ("random", &random, vec![1.0, 0.7, -1.2]),
        ("pair", &trained, vec![1.0, 1.0]),
        ("pool", &pool, vec![1.0; 4]),
    ] {
        let weighted = at(adapters, &strengths);
        let file = File::of(&weighted);
        let plan = Plan::new(&weighted).unwrap();
        let (mut tsv, mut iso, mut cut) = (Vec::new(), Vec::new(), false);
        for (i, layer) in plan.layers().iter().enumerate() {
            let dense: Vec<Matrix> = layer.members.iter().map(|&k| updates(&file, i)[k].clone()).collect();
            // Of one adapter there is nothing to merge.
            if let [only] = &dense[..] {
                tsv.push(only.clone());
                iso.push(only.clone());
                continue;
            }
            let most = layer.rank.min(layer.input).min(layer.output) / dense.len();
            let (mut left, mut values, mut right) = (Vec::new(), Vec::new(), Vec::new());
            for (u, s, v) in dense.iter().map(svd) {
                let n = s.len().min(most);
                cut |= n < s.len();
                let rows = |m: &Matrix| Matrix::from_fn(n, m.cols(), |k, j| m[(k, j)]);
                left.push(rows(&u));
                right.push(rows(&v));
                values.extend(&s[..n]);
            }
            tsv.push(outer(&polar(&stack(&left)), &values, &polar(&stack(&right))));
            let sum =
                Matrix::from_fn(layer.output, layer.input, |i, j| dense.iter().map(|m| m[(i, j)]).sum());
            let (u, s, v) = svd(&sum);
            let mean = s.iter().sum::<f64>() / layer.input.min(layer.output) as f64;
            iso.push(outer(&u, &vec![mean; s.len()], &v));
        }
        // The pair has equal ranks, of which nothing is cut.
        assert_eq!(cut, name != "pair", "{name}");
        for (method, merge, want) in
            [("tsv", CoreMerge::tsv(Tsv::paper()), tsv), ("iso-c", CoreMerge::iso_c(Iso::paper()), iso)]
        {
            let count = if name == "random" { devices.len() } else { 1 };
            for case in &devices[..count] {
                let merged = merge.merge(&case.device, &weighted).unwrap();
                let error = worst(&merged, &file, &want);
                if name != "random" {
                    println!("{method}, paper, {name}: {error:e}");
                }
                assert!(error <= tolerance(case), "{method}, {name}, {}: {error:e}", case.name);
            }
        }
    }
}
