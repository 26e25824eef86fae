//! Every method on the same noise: what its samples show, and what it loses.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use burn::prelude::*;
use loraweld::fusion::{self, Choice, KLoraOptions, Objective, RefinerOptions, Scope, Selection};
use loraweld::merge::strengths;
use loraweld::{
    Adapter, Calibration, Control, Coordinates, Linear, Merged, Projection, SaveOptions, Ssr, SsrOptions,
    TaskBalance, Truncating, Truncation, Weighted,
};

use crate::adapters::{Fused, Live, Rule, calibrate};
use crate::classifier::{Classifier, FEATURES, HEART, SHADE};
use crate::data::{CONCEPTS, Data, Images, Noise, PIXELS, shaded};
use crate::model::{DigitDit, Fuse, Plain, TOKENS};
use crate::run::{BATCH, Refinement, loss, sample};
use crate::shared::{Shared, read};
use crate::table::{ConceptRow, Effort, PairRow, Results, Rows, retain};

/// What all methods share.
pub struct Bench<'a> {
    shared: &'a Shared,
    model: &'a DigitDit,
    data: &'a Data,
    effort: Effort,
    digits: Images,
    hearts: Images,
    /// Called with what is being done.
    progress: &'a dyn Fn(&str),
}

const OTHERS: [usize; 9] = [0, 1, 3, 4, 5, 6, 7, 8, 9];
const UNTOUCHED: [usize; 6] = [0, 2, 5, 6, 8, 9];
/// Samples of a picture: of the pair's class 2 and others, of each concept.
const SHOWN: [usize; 2] = [5, 3];

/// The choice per token, by divergence: what [`Selection::default`] gives.
pub fn by_token() -> Selection {
    Selection::default()
}

/// The published choice: one for each layer and image.
pub fn by_layer() -> Selection {
    Selection { scope: Scope::Group(TOKENS), ..Default::default() }
}

/// The refinement: in the middle of the run, steps of a fiftieth of the noise that it starts from.
pub const REFINER: RefinerOptions = RefinerOptions {
    rate: 0.02,
    ramp: fusion::Ramp::Constant,
    window: (0.2, 0.8),
    normalise: true,
    clamp: 0.1,
};

impl<'a> Bench<'a> {
    /// Reads the images that losses are measured on.
    pub fn new(
        shared: &'a Shared,
        model: &'a DigitDit,
        data: &'a Data,
        effort: Effort,
        progress: &'a dyn Fn(&str),
    ) -> Result<Self> {
        let (digits, hearts) = (Images::digits(data)?, Images::hearts(data)?);
        Ok(Self { shared, model, data, effort, digits, hearts, progress })
    }

    /// Both tables.
    pub fn run(&self) -> Result<Results> {
        let start = Instant::now();
        let (pair, pair_rows) = self.pair()?;
        let (concepts, concept_rows) = self.concepts()?;
        Ok(Results {
            device: self.shared.loraweld.describe(),
            effort: self.effort,
            pair,
            concepts,
            seconds: start.elapsed().as_secs_f64(),
            pictures: [pair_rows, concept_rows],
        })
    }

    fn fused(&self, adapters: &[Weighted<'_>], rule: Rule) -> Result<Fused> {
        Fused::new(self.shared, adapters, BATCH * TOKENS, rule)
    }

    /// Runs the sampler for four steps on three images with one adapter after the other, which fills a calibration.
    fn calibrated(&self, pool: &[&Adapter], labels: &[&[usize]]) -> Result<Calibration> {
        let weighted: Vec<Weighted<'_>> = pool.iter().map(|adapter| adapter.at(1.0)).collect();
        let mut fused = self.fused(&weighted, Rule::fixed(&vec![0.0; pool.len()]))?;
        calibrate(&mut fused, pool, |task, fused| {
            // The same noise for every task, as published.
            let noise = Noise::new(42).take(labels[task].len() * PIXELS);
            sample(self.model, &noise, labels[task], 4, fused, None).map(drop)
        })
    }

    fn pair(&self) -> Result<(Vec<PairRow>, Rows)> {
        let (heart, shade) = (self.data.adapter("content_heart")?, self.data.adapter("style_shade")?);
        let pair = [heart.at(1.0), shade.at(1.0)];
        let fused = |rule: Rule| Ok::<_, anyhow::Error>(Box::new(self.fused(&pair, rule)?) as Box<dyn Fuse>);
        let fixed = |subject: f32, style: f32| fused(Rule::fixed(&[subject, style]));
        let live = |projection: Projection| {
            let mut live = Live::new(self.shared, shade.at(1.0), heart.at(1.0))?;
            live.set(projection, 1.0, 1.0)?;
            Ok::<_, anyhow::Error>(Box::new(live) as Box<dyn Fuse>)
        };
        let scheduled = |schedule: fusion::Schedule| fused(Rule::Scheduled(Arc::new(schedule)));
        let (a, b) = (pair[0], pair[1]);

        (self.progress)("SSR-Merge: calibrating on the running model");
        let every: Vec<usize> = (0..10).collect();
        let calibration = self.calibrated(&[&heart, &shade], &[&[2, 2, 2], &every])?;
        let ssr = Ssr::new(&calibration).merge(&self.shared.loraweld, &pair)?.adapter;

        let judge = Classifier::load(self.shared, self.data, "subject_style", &["subject", "style"])?;
        let [images, times] = self.effort.losses;
        let styled_hearts = self.hearts.map(shaded).of(&[2], images);
        let styled = self.digits.map(shaded).of(&OTHERS, images.min(4));
        let objectives =
            [self.objective(&judge, &self.digits.map(shaded))?, self.objective(&judge, &self.hearts)?];
        let [subjects, others] = self.effort.samples;
        let [style, subject] = objectives.clone();
        let balanced = Objective::balanced(style, subject, 0.5);
        let mut refinement = Refinement::new(self.shared, &judge, balanced, subjects, REFINER)?;
        // The refinement pulls toward hearts: it is for the samples that are to be hearts.
        let blind = Ssr::data_free().merge(&self.shared.loraweld, &pair)?.adapter;
        let methods: [(&str, Box<dyn Fuse>, bool); 15] = [
            ("base", Box::new(Plain), false),
            ("heart alone", fixed(1.0, 0.0)?, false),
            ("shade alone", fixed(0.0, 1.0)?, false),
            ("average", fixed(0.5, 0.5)?, false),
            ("sum", fixed(1.0, 1.0)?, false),
            ("NP-LoRA, soft", live(Projection::Soft(0.5))?, false),
            ("NP-LoRA, hard", live(Projection::Hard)?, false),
            ("SSR-Merge", Box::new(self.fused(&[ssr.at(1.0)], Rule::fixed(&[1.0]))?), false),
            ("SSR-Merge without data", Box::new(self.fused(&[blind.at(1.0)], Rule::fixed(&[1.0]))?), false),
            (
                "K-LoRA",
                scheduled(fusion::k_lora(a, b, &KLoraOptions::default(), Control::default())?)?,
                false,
            ),
            ("EST-LoRA", scheduled(fusion::est(a, b, &Default::default())?)?, false),
            ("selection by layer", fused(Rule::Always(by_layer()))?, false),
            ("selection by token", fused(Rule::Always(by_token()))?, false),
            ("by layer, refined", fused(Rule::Always(by_layer()))?, true),
            ("by token, refined", fused(Rule::Always(by_token()))?, true),
        ];
        let mut rows = Rows {
            columns: [vec!["2".to_owned(); SHOWN[0].min(subjects)], OTHERS.map(|c| c.to_string()).to_vec()]
                .concat(),
            rows: Vec::new(),
        };
        let mut table = Vec::new();
        for (method, mut fuse, refined) in methods {
            (self.progress)(method);
            let labels: Vec<usize> = OTHERS.iter().flat_map(|&class| vec![class; others]).collect();
            let hearts =
                self.draw(&vec![2; subjects], 5, fuse.as_mut(), refined.then_some(&mut refinement))?;
            let digits = self.draw(&labels, 6, fuse.as_mut(), None)?;
            rows.rows.push((
                method.to_owned(),
                hearts.images().take(SHOWN[0]).chain(digits.images().step_by(others)).collect(),
            ));
            let seen = read(judge.features(hearts.0.clone()))?;
            let distance = |objective: &Objective| {
                let each = seen.chunks_exact(FEATURES).map(|features| objective.evaluate(features));
                let sum: f64 =
                    each.map(|evaluated| evaluated.map(|(loss, _)| loss)).sum::<loraweld::Result<_>>()?;
                Ok::<_, anyhow::Error>(sum / subjects as f64)
            };
            let distances = [distance(&objectives[0])?, distance(&objectives[1])?];
            let (h, d) = (judge.judge(hearts.0)?, judge.judge(digits.0)?);
            let share = |count: usize, of: usize| count as f64 / of as f64;
            let count = |classes: &[usize], class: usize| classes.iter().filter(|&&c| c == class).count();
            let both = h[0].iter().zip(&h[1]).filter(|&(s, t)| (*s, *t) == (HEART, SHADE)).count();
            let kept = d[0].iter().zip(&labels).filter(|(got, want)| got == want).count();
            table.push(PairRow {
                method: method.to_owned(),
                subject: share(count(&h[0], HEART), subjects),
                style: share(count(&h[1], SHADE), subjects),
                both: share(both, subjects),
                style_of_others: share(count(&d[1], SHADE), labels.len()),
                digits_kept: share(kept, labels.len()),
                distances,
                loss_subject: loss(self.model, &styled_hearts, times, fuse.as_mut())?,
                loss_others: loss(self.model, &styled, times, fuse.as_mut())?,
            });
        }
        Ok((table, rows))
    }

    fn concepts(&self) -> Result<(Vec<ConceptRow>, Rows)> {
        let adapters =
            CONCEPTS.iter().map(|concept| self.data.adapter(concept.adapter)).collect::<Result<Vec<_>>>()?;
        let pool: Vec<&Adapter> = adapters.iter().collect();
        let weighted: Vec<Weighted<'_>> = adapters.iter().map(|adapter| adapter.at(1.0)).collect();
        let fused =
            |rule: Rule| Ok::<_, anyhow::Error>(Box::new(self.fused(&weighted, rule)?) as Box<dyn Fuse>);
        let fixed = |weights: [f32; 4]| fused(Rule::fixed(&weights));
        let alone = |k: usize| fixed(std::array::from_fn(|i| f32::from(u8::from(i == k))));

        (self.progress)("SSR-Merge of four: calibrating on the running model");
        let labels = CONCEPTS.map(|concept| vec![concept.class; 3]);
        let labels: Vec<&[usize]> = labels.iter().map(Vec::as_slice).collect();
        let calibration = self.calibrated(&pool, &labels)?;
        let ssr = |options: SsrOptions| {
            let merge = Ssr::new(&calibration).options(options);
            let merged = merge.merge(&self.shared.loraweld, &weighted)?.adapter;
            Ok::<_, anyhow::Error>(
                Box::new(self.fused(&[merged.at(1.0)], Rule::fixed(&[1.0]))?) as Box<dyn Fuse>
            )
        };
        let device = &self.shared.loraweld;
        let control = Control::default();
        let merged = |merged: Merged| {
            Ok::<_, anyhow::Error>(
                Box::new(self.fused(&[merged.adapter.at(1.0)], Rule::fixed(&[1.0]))?) as Box<dyn Fuse>
            )
        };
        let files = SsrOptions { coordinates: Coordinates::Files, ..SsrOptions::default() };
        let fair = SsrOptions { balance: TaskBalance::Fair, ..SsrOptions::default() };
        let blind = |options: SsrOptions| merged(Ssr::data_free().options(options).merge(device, &weighted)?);
        let at_rank_4 = |data| {
            let by = Truncating { truncation: Truncation::rank(4), budget: None, data };
            let whole = Ssr::new(&calibration).merge(device, &weighted)?;
            merged(whole.truncated_by(&by, &SaveOptions::default(), device, &control)?)
        };
        let found = strengths(device, &calibration, &weighted, false, &control)?;
        let best: Vec<f32> = found.blocks[0].strengths.iter().map(|s| s.unwrap_or(1.0) as f32).collect();
        let quieter = Linear.merge(&weighted)?.singular_values_calibrated(device, &weighted, &control)?;
        let soft = Selection { choice: Choice::Soft, normalise: true, ..Default::default() };
        let methods: [(&str, Box<dyn Fuse>); 19] = [
            ("base", Box::new(Plain)),
            ("mirror alone", alone(0)?),
            ("rot90 alone", alone(1)?),
            ("thick alone", alone(2)?),
            ("invert alone", alone(3)?),
            ("average", fixed([0.25; 4])?),
            ("sum", fixed([1.0; 4])?),
            ("SSR-Merge, published", ssr(SsrOptions::published())?),
            ("SSR-Merge", ssr(SsrOptions::default())?),
            ("SSR-Merge in the files' coordinates", ssr(files.clone())?),
            ("SSR-Merge, fair", ssr(fair)?),
            ("SSR-Merge, rank 4", at_rank_4(Some((&calibration, &weighted[..])))?),
            ("SSR-Merge, rank 4 by norm", at_rank_4(None)?),
            ("SSR-Merge without data", blind(SsrOptions::default())?),
            ("the same in the files' coordinates", blind(files)?),
            ("sum at the best strengths", fused(Rule::fixed(&best))?),
            ("sum, singular values calibrated", merged(quieter)?),
            ("selection by token", fused(Rule::Always(by_token()))?),
            ("soft, normalised", fused(Rule::Always(soft))?),
        ];
        let judge = Classifier::load(self.shared, self.data, "concept", &["subject"])?;
        let [images, times] = self.effort.losses;
        let each = self.effort.concept_samples;
        let untouched = self.digits.of(&UNTOUCHED, images.min(6));
        let real = CONCEPTS.map(|concept| self.digits.of(&[concept.class], images).map(concept.change));
        let shown = SHOWN[1].min(each);
        let mut rows = Rows {
            columns: CONCEPTS.iter().flat_map(|c| vec![c.class.to_string(); shown]).collect(),
            rows: Vec::new(),
        };
        let mut table: Vec<ConceptRow> = Vec::new();
        for (method, mut fuse) in methods {
            (self.progress)(method);
            let labels: Vec<usize> = CONCEPTS.iter().flat_map(|c| vec![c.class; each]).collect();
            let samples = self.draw(&labels, 7, fuse.as_mut(), None)?;
            let of_each = samples.images().enumerate().filter(|(i, _)| i % each < shown);
            rows.rows.push((method.to_owned(), of_each.map(|(_, image)| image).collect()));
            let judged = judge.judge(samples.0)?;
            let wanted = CONCEPTS.iter().flat_map(|c| vec![c.shown; each]);
            let right = judged[0].iter().zip(wanted).filter(|&(got, want)| *got == want).count();
            let losses = real
                .iter()
                .map(|real| loss(self.model, real, times, fuse.as_mut()))
                .collect::<Result<_>>()?;
            table.push(ConceptRow {
                method: method.to_owned(),
                losses,
                retention: Vec::new(),
                mean_retention: 0.0,
                shown: right as f64 / labels.len() as f64,
                loss_others: loss(self.model, &untouched, times, fuse.as_mut())?,
            });
        }
        retain(&mut table);
        Ok((table, rows))
    }

    /// Likeness to the features of these images.
    fn objective(&self, judge: &Classifier, images: &Images) -> Result<Objective> {
        let features = read(judge.features(self.model.images(&images.pixels)))?;
        Ok(Objective::new(features.chunks_exact(FEATURES))?)
    }

    fn draw(
        &self,
        labels: &[usize],
        seed: u64,
        fuse: &mut dyn Fuse,
        refinement: Option<&mut Refinement<'_>>,
    ) -> Result<Drawn> {
        let noise = Noise::new(seed).take(labels.len() * PIXELS);
        let images = sample(self.model, &noise, labels, self.effort.steps, fuse, refinement)?;
        let pixels = read(images.clone())?;
        Ok(Drawn(images, pixels))
    }
}

/// Samples, on the device and here.
struct Drawn(Tensor<4>, Vec<f32>);

impl Drawn {
    fn images(&self) -> impl Iterator<Item = Vec<f32>> + '_ {
        self.1.chunks_exact(PIXELS).map(<[f32]>::to_vec)
    }
}
