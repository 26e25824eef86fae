//! Feature-level selection (arXiv 2602.15539): what each adapter would do to a layer's output decides which of them
//! acts.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;

use crate::adapter::dotted;
use crate::compute::gpu::Gpu;
use crate::compute::ops::Activations;
use crate::compute::ops::Score;
use crate::compute::ops::branches::{
    self, Buffers, Call, Controls, Halves, MAX_BRANCHES, RECORD, RUNNING, Rule,
};
use crate::compute::{Batch, Element, Shape};
use crate::power::{self, pow2};
use crate::{Device, Dtype, Error, Layer, LayerKey, Matrix, RawMatrix, Result, Weighted};

/// Who acts.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Choice {
    /// The adapter of the largest score; of equals the first.
    #[default]
    Hard,
    /// All, weighted by `D_k / Σ D`.
    Soft,
    /// These weights of the adapters, without scores: `[1.0, 0.0]` the first, `[1.0, 1.0]` the sum.
    Fixed(Vec<f32>),
}

/// What decides together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scope {
    /// Each token for itself.
    #[default]
    Token,
    /// So many consecutive tokens by their mean score: an image of a batch.
    Group(usize),
    /// All tokens of the call by their mean score, as published.
    Layer,
}

/// How a call of [`Selector::encode`] decides.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// What is compared.
    pub score: Score,
    /// Who acts.
    pub choice: Choice,
    /// What decides together.
    pub scope: Scope,
    /// Compare scores in relation to each adapter's running mean on that layer, over the last million tokens, these
    /// included: for adapters of unlike strength.
    pub normalise: bool,
}

/// What a [`Selector`] allocates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectorOptions {
    /// Most tokens of a call.
    pub tokens: usize,
    /// Calls that the log reaches back.
    pub records: usize,
    /// Keep the accuracy of f32 also for features of 16 bits, on devices that have matrix units; see
    /// [accuracy](Selector#accuracy).
    pub exact: bool,
    /// Keep, for each layer, what its last call was recorded with, for the next one if that has the same buffers, tokens and
    /// [`Selection`]: a host that runs its layers again and again in the same buffers records them in about 60 % of the time.
    /// Its buffers stay alive until a call with others takes their place, or the selector goes.
    pub keep: bool,
}

impl Default for SelectorOptions {
    fn default() -> Self {
        Self { tokens: 4608, records: 4096, exact: false, keep: false }
    }
}

/// An entry of [`Selector::decisions`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Calls before this one.
    pub call: u64,
    /// The layer's name.
    pub layer: String,
    /// Tokens that each adapter won; 0 for those that lack the layer. A soft mix or fixed weights are won by the
    /// largest weight.
    pub wins: Vec<u32>,
}

/// What the last call decided, from [`Selector::tokens`]: tokens × adapters, zero for those that lack the layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tokens {
    /// D of each token and adapter; of a call with fixed weights they mean nothing.
    pub scores: Matrix,
    /// The weight of each adapter on each token.
    pub weights: Matrix,
}

/// Feature-level selection among adapters, on the device: two to eight, or one that is to act alone.
///
/// At a layer `f0 = W·x` each adapter k would add `u_k = s_k·B_k·A_k·x`. With the score D_k of what that does,
///
/// ```text
/// kl      D_k = KL(softmax(f0/τ) ‖ softmax((f0 + u_k)/τ))  over the channels
/// dot     D_k = 1 − cos(f0, f0 + u_k)
/// energy  D_k = ‖u_k‖²
/// ```
///
/// f0 becomes `f0 + Σ w_k·u_k`: w is 1 for the largest D ([`Choice::Hard`]) or `D_k / ΣD` ([`Choice::Soft`]), for each
/// token by itself or for many by their mean ([`Scope`]). How features become distributions is our choice, and so are
/// the token as the default scope, which composed far better than the published choice for a whole layer, and the
/// normalisation. An adapter that lacks a layer takes no part in it; a layer that only one has is that one's.
///
/// Factors stay on the device, in f32 and, where it has matrix units, also as the halves that those multiply. A call
/// adds dispatches to the host's encoder, and reads nothing back: one product `Z = X·A_catᵀ`, one pass over f0 for the
/// scores, one that decides, one over f0 in place for the result.
///
/// # Accuracy
/// The divergence is summed as `ln(1 + Σ p·φ(u − ū))`, `φ(d) = e^d − 1 − d`, whose terms are all positive:
/// it keeps 1e-5 of itself, however small, for features up to ±80 τ, and is finite for ±1e4. Decisions equal those of
/// the f64 twin unless the two largest scores are within 1e-4 of each other.
///
/// Features in f16 and bf16 are rounded themselves, to 5e-4 and 4e-3 of their size. On matrix units they are met in one
/// product of halves, which is about twice as fast: scores are then good to 2e-3 of themselves or 1e-6, decisions equal
/// within that margin, and what is added to a feature is good to 1e-3 of its size before it is rounded.
/// [`SelectorOptions::exact`] asks for f32's accuracy there too.
///
/// # Example
/// ```
/// use loraweld::fusion::{Selection, Selector, SelectorOptions};
/// use loraweld::{Adapter, Device, RawMatrix};
/// # fn main() -> loraweld::Result<()> {
/// # let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/loras");
/// let heart = Adapter::open(format!("{data}/content_heart.safetensors"))?;
/// let shade = Adapter::open(format!("{data}/style_shade.safetensors"))?;
/// let options = SelectorOptions { tokens: 16, ..Default::default() };
/// let mut selector = Selector::new(&Device::cpu(), &[heart.at(1.0), shade.at(1.0)], options)?;
/// // A host with buffers of its own calls `encode` instead.
/// let (x, mut f0) = ([0.5; 16 * 128], [0.25; 16 * 128]);
/// let x = RawMatrix::from_f32(16, 128, &x)?;
/// selector.run("transformer_blocks.0.attn.to_q", x, &mut f0, &Selection::default())?;
/// println!("{:?}", selector.decisions()?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Selector {
    device: Device,
    options: SelectorOptions,
    layers: Vec<Resident>,
    /// Where each layer is in them, and each name that a host has said: reading a name takes longer than all else of a call.
    keys: BTreeMap<LayerKey, usize>,
    names: HashMap<String, usize>,
    strengths: Vec<f32>,
    temperature: f64,
    backend: Backend,
    /// The layer of every call that the log still holds, by the number of the call.
    calls: VecDeque<(u64, usize, Vec<u32>)>,
    count: u64,
    last: Option<Last>,
}

#[derive(Debug)]
enum Backend {
    Gpu(Box<Buffers>),
    /// Running means by layer.
    Cpu(Vec<[f64; RUNNING]>),
}

/// A layer's factors where they are used.
#[derive(Debug)]
struct Resident {
    name: String,
    input: usize,
    output: usize,
    /// Adapter of each branch.
    members: Vec<usize>,
    blocks: Vec<Range<usize>>,
    factors: Vec<f32>,
    /// On a GPU: A_cat and B_catᵀ, at powers of two that the factors undo.
    batch: Batch,
    /// Halves of these, for matrix units.
    halves: Halves,
    /// On the CPU: B of each branch, without its strength.
    b: Vec<Vec<f64>>,
}

/// The last call.
#[derive(Debug)]
struct Last {
    layer: usize,
    tokens: usize,
    /// Decisions of the CPU.
    decided: branches::Decided,
}

impl Selector {
    /// Puts the adapters' factors on the device.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no or more than eight adapters, or a strength that is not finite;
    /// [`Error::Layer`] if adapters disagree on a layer's widths or a factor is not finite; [`Error::Device`] if it does
    /// not fit in [`Device::memory`].
    pub fn new(device: &Device, adapters: &[Weighted<'_>], options: SelectorOptions) -> Result<Self> {
        if !(1..=MAX_BRANCHES).contains(&adapters.len()) {
            return Err(Error::Invalid(format!(
                "a selector takes 1 to {MAX_BRANCHES} adapters, not {}",
                adapters.len()
            )));
        }
        if options.tokens == 0 || options.records == 0 {
            return Err(Error::Invalid("a selector needs room for 1 token and 1 record at least".into()));
        }
        let strengths =
            adapters.iter().map(|w| strength(w.adapter.name(), w.strength)).collect::<Result<Vec<_>>>()?;
        let all = members(adapters)?;
        let rank = all.values().map(|of| of.iter().map(|(_, layer)| layer.rank).sum()).max().unwrap_or(0);
        // The CPU has no use for it.
        let low: Vec<bool> = all.values().map(|of| device.is_gpu() && has_low(of)).collect();
        let backend = match device.is_gpu() {
            true => {
                let gpu = device.gpu()?;
                let buffers = Buffers::new(
                    gpu,
                    options.tokens,
                    rank,
                    adapters.len(),
                    all.len(),
                    options.records,
                    options.keep,
                )?;
                let factors: u64 = all.values().zip(&low).map(|(of, &low)| bytes(gpu, of, low)).sum();
                if factors + buffers.bytes() > device.memory() {
                    return Err(Error::Device(format!(
                        "selection takes {} MiB of device memory, of which {} for factors, but {} may be used; \
                         allow more, or fewer tokens or layers",
                        (factors + buffers.bytes()) >> 20,
                        factors >> 20,
                        device.memory() >> 20
                    )));
                }
                Backend::Gpu(Box::new(buffers))
            }
            false => Backend::Cpu(vec![[0.0; RUNNING]; all.len()]),
        };
        let (mut layers, mut keys) = (Vec::new(), BTreeMap::new());
        for (index, ((key, of), low)) in all.into_iter().zip(low).enumerate() {
            layers.push(Resident::load(device, &of, low)?);
            keys.insert(key.clone(), index);
        }
        adapters.iter().try_for_each(|weighted| weighted.adapter.check_file())?;
        let mut selector = Self {
            device: device.clone(),
            options,
            layers,
            keys,
            names: HashMap::new(),
            strengths,
            temperature: 1.0,
            backend,
            calls: VecDeque::new(),
            count: 0,
            last: None,
        };
        selector.write_controls()?;
        selector.reset()?;
        Ok(selector)
    }

    /// Names of the layers that it serves.
    pub fn layers(&self) -> impl Iterator<Item = &str> {
        self.layers.iter().map(|layer| layer.name.as_str())
    }

    /// Whether any adapter has the layer of this name, in any spelling.
    pub fn has(&self, layer: &str) -> bool {
        LayerKey::find(layer, &self.keys).is_some()
    }

    /// Bytes of device memory that it holds.
    pub fn bytes(&self) -> u64 {
        match &self.backend {
            Backend::Cpu(_) => 0,
            Backend::Gpu(buffers) => {
                let of = |layer: &Resident| {
                    layer.batch.wgpu_buffer().map_or(0, wgpu::Buffer::size) + layer.halves.bytes()
                };
                buffers.bytes() + self.layers.iter().map(of).sum::<u64>()
            }
        }
    }

    /// Changes an adapter's strength. Writes 48 bytes to the device, which take effect with the next submission, also
    /// for calls that are encoded already.
    pub fn set_strength(&mut self, adapter: usize, value: f64) -> Result<()> {
        let count = self.strengths.len();
        let Some(place) = self.strengths.get_mut(adapter) else {
            return Err(Error::Invalid(format!("there is no adapter {adapter}: there are {count}")));
        };
        *place = strength("it", value)?;
        self.write_controls()
    }

    /// Changes the temperature τ of [`Score::Kl`], 1 at first; as [`set_strength`](Self::set_strength).
    pub fn set_temperature(&mut self, value: f64) -> Result<()> {
        let inverse = (1.0 / value) as f32;
        if !(value > 0.0 && inverse.is_normal()) {
            return Err(Error::Invalid(format!("a temperature must be above 0 and finite, not {value}")));
        }
        self.temperature = value;
        self.write_controls()
    }

    /// Forgets the running means of scores, as at the start of another prompt.
    pub fn reset(&mut self) -> Result<()> {
        match &mut self.backend {
            Backend::Cpu(running) => running.iter_mut().for_each(|r| *r = [0.0; RUNNING]),
            Backend::Gpu(buffers) => {
                let gpu = self.device.gpu()?;
                gpu.write(&buffers.running, 0, &vec![0; self.layers.len() * RUNNING * 4])?;
            }
        }
        Ok(())
    }

    /// Records `f0 += Σ w_k·u_k` for a layer into the host's encoder, which the host submits.
    ///
    /// `x`: tokens × in, `f0`: tokens × out, each f32, f16 or bf16 in buffers of the device with usage `STORAGE`; f0 is
    /// changed in place, rounded once. They may be parts of one buffer. f0 of 16 bits needs an even width.
    /// Calls of one selector share its scratch buffers: submit its encoders in the order of recording.
    ///
    /// # Errors
    /// [`Error::Layer`] if no adapter has the layer, which the host should then leave alone, or shapes do not fit;
    /// [`Error::Invalid`] for bad weights or too many tokens; [`Error::Device`] on a CPU.
    pub fn encode(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        layer: &str,
        x: Activations<'_>,
        f0: Activations<'_>,
        selection: &Selection,
    ) -> Result<()> {
        let index = self.find(layer)?;
        let Backend::Gpu(buffers) = &self.backend else {
            return Err(Error::Device("a selector of the CPU has no commands to encode; use `run`".into()));
        };
        let resident = &self.layers[index];
        let call = self.call(resident, x.shape().rows, selection)?;
        let within = |e| in_layer(&resident.name, e);
        branches::check(&call, resident.input, x.shape(), f0.shape(), f0.dtype()).map_err(within)?;
        if call.tokens > 0 {
            let record = (self.count % self.options.records as u64) as usize;
            let gpu = self.device.gpu()?;
            branches::encode(gpu, encoder, buffers, &resident.batch, &call, x, f0, index, record)
                .map_err(within)?;
        }
        let tokens = call.tokens;
        self.note(index, tokens, branches::Decided::default(), Vec::new());
        Ok(())
    }

    /// Does what [`encode`](Self::encode) records, at once and on host memory: on the CPU in f64, or through the GPU and
    /// back.
    pub fn run(
        &mut self,
        layer: &str,
        x: RawMatrix<'_>,
        f0: &mut [f32],
        selection: &Selection,
    ) -> Result<()> {
        let index = self.find(layer)?;
        let resident = &self.layers[index];
        if f0.len() != Shape::new(x.rows(), resident.output).len() {
            return Err(in_layer(
                &resident.name,
                Error::Invalid(format!(
                    "f0 holds {} values, but {} tokens of {} channels were expected",
                    f0.len(),
                    x.rows(),
                    resident.output
                )),
            ));
        }
        if self.device.is_gpu() {
            return self.run_gpu(layer, x, f0, selection);
        }
        let call = self.call(resident, x.rows(), selection)?;
        branches::check(&call, resident.input, shape(x), Shape::new(x.rows(), resident.output), Dtype::F32)
            .map_err(|e| in_layer(&resident.name, e))?;
        let Backend::Cpu(running) = &self.backend else { return Ok(()) };
        let mut running = running[index];
        let mut wide: Vec<f64> = f0.iter().map(|f| f64::from(*f)).collect();
        let b: Vec<Vec<f64>> = resident
            .b
            .iter()
            .zip(&resident.members)
            .map(|(b, &k)| b.iter().map(|v| v * f64::from(self.strengths[k])).collect())
            .collect();
        let a = resident.batch.host()?.values(0);
        let decided =
            branches::branches_cpu(&call, a, &b, 1.0 / self.temperature, x, &mut wide, &mut running);
        f0.iter_mut().zip(&wide).for_each(|(f, w)| *f = *w as f32);
        let mut wins = vec![0; call.blocks.len()];
        for row in decided.weights.chunks_exact(wins.len()) {
            let most = (1..row.len()).fold(0, |best, k| if row[k] > row[best] { k } else { best });
            wins[most] += 1;
        }
        let tokens = call.tokens;
        if let Backend::Cpu(all) = &mut self.backend {
            all[index] = running;
        }
        self.note(index, tokens, decided, wins);
        Ok(())
    }

    fn run_gpu(
        &mut self,
        layer: &str,
        x: RawMatrix<'_>,
        f0: &mut [f32],
        selection: &Selection,
    ) -> Result<()> {
        let gpu = self.device.gpu()?.clone();
        let upload = |bytes: &[u8]| {
            let buffer = gpu.allocate("features", bytes.len().max(1) as u64)?;
            let mut padded = bytes.to_vec();
            padded.resize(bytes.len().next_multiple_of(4), 0);
            gpu.write(&buffer, 0, &padded).map(|()| buffer)
        };
        let (x_buffer, f0_buffer) = (upload(x.bytes())?, upload(bytemuck::cast_slice(f0))?);
        let on_device =
            |buffer, dtype, width| Activations::Buffer { buffer, offset: 0, dtype, tokens: x.rows(), width };
        let index = self.find(layer)?;
        let output = self.layers[index].output;
        let width = f0.len().checked_div(x.rows()).unwrap_or(output);
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        let (x_rows, f0_rows) =
            (on_device(&x_buffer, x.dtype(), x.cols()), on_device(&f0_buffer, Dtype::F32, width));
        self.encode(&mut encoder, layer, x_rows, f0_rows, selection)?;
        gpu.queue.submit([encoder.finish()]);
        f0.copy_from_slice(&bytemuck::pod_collect_to_vec::<_, f32>(
            &gpu.read(&f0_buffer, 4 * f0.len() as u64)?,
        ));
        Ok(())
    }

    /// Reads the log: the last calls, as many as [`SelectorOptions::records`]. Waits for the device. A call that was
    /// encoded but not submitted yet shows what its record held before.
    pub fn decisions(&self) -> Result<Vec<Decision>> {
        let log: Option<Vec<u32>> = match &self.backend {
            Backend::Cpu(_) => None,
            Backend::Gpu(buffers) => {
                let bytes = (self.options.records * RECORD * 4) as u64;
                Some(bytemuck::pod_collect_to_vec(&self.device.gpu()?.read(&buffers.log, bytes)?))
            }
        };
        let decision = |(call, layer, wins): &(u64, usize, Vec<u32>)| {
            let layer = &self.layers[*layer];
            let record = (call % self.options.records as u64) as usize * RECORD;
            let counts = log.as_ref().map_or(wins.as_slice(), |log| &log[record..record + RECORD]);
            let mut wins = vec![0; self.strengths.len()];
            for (count, &adapter) in counts.iter().zip(&layer.members) {
                wins[adapter] = *count;
            }
            Decision { call: *call, layer: layer.name.clone(), wins }
        };
        Ok(self.calls.iter().map(decision).collect())
    }

    /// Reads what the last call decided for each token. Waits for the device.
    pub fn tokens(&self) -> Result<Tokens> {
        let Some(last) = &self.last else { return Ok(Tokens::default()) };
        let layer = &self.layers[last.layer];
        let branches = layer.members.len();
        let (scores, weights) = match &self.backend {
            Backend::Cpu(_) => (last.decided.scores.clone(), last.decided.weights.clone()),
            Backend::Gpu(buffers) => {
                let read = |buffer| {
                    let bytes = (last.tokens * branches * 4) as u64;
                    Ok(Batch::decode(Element::F32, &self.device.gpu()?.read(buffer, bytes)?))
                };
                (read(&buffers.scores)?, read(&buffers.weights)?)
            }
        };
        let spread = |values: Vec<f64>| {
            let mut matrix = Matrix::zeros(last.tokens, self.strengths.len());
            for (i, value) in values.into_iter().enumerate() {
                matrix[(i / branches, layer.members[i % branches])] = value;
            }
            matrix
        };
        Ok(Tokens { scores: spread(scores), weights: spread(weights) })
    }

    fn note(&mut self, layer: usize, tokens: usize, decided: branches::Decided, wins: Vec<u32>) {
        if tokens == 0 {
            return;
        }
        if self.calls.len() == self.options.records {
            self.calls.pop_front();
        }
        self.calls.push_back((self.count, layer, wins));
        self.count += 1;
        self.last = Some(Last { layer, tokens, decided });
    }

    /// Where the layer of this name is.
    fn find(&mut self, layer: &str) -> Result<usize> {
        if let Some(&index) = self.names.get(layer) {
            return Ok(index);
        }
        let Some((_, &index)) = LayerKey::find(layer, &self.keys) else {
            return Err(Error::layer(
                layer,
                "none of the selector's adapters has it; leave its output alone",
            ));
        };
        self.names.insert(layer.to_owned(), index);
        Ok(index)
    }

    fn call<'a>(&self, layer: &'a Resident, tokens: usize, selection: &Selection) -> Result<Call<'a>> {
        if tokens > self.options.tokens {
            return Err(in_layer(
                &layer.name,
                Error::Invalid(format!(
                    "{tokens} tokens, but the selector was made for {} (SelectorOptions::tokens)",
                    self.options.tokens
                )),
            ));
        }
        let alone = layer.members.len() == 1;
        let rule = match &selection.choice {
            Choice::Hard | Choice::Soft if alone => {
                let mut weights = [0.0; MAX_BRANCHES];
                weights[0] = 1.0;
                Rule::Fixed(weights)
            }
            Choice::Hard => Rule::Hard,
            Choice::Soft => Rule::Soft,
            Choice::Fixed(given) => {
                if given.len() != self.strengths.len() || given.iter().any(|w| !w.is_finite()) {
                    return Err(Error::Invalid(format!(
                        "fixed weights must be {} finite numbers, one for each adapter, not {given:?}",
                        self.strengths.len()
                    )));
                }
                let mut weights = [0.0; MAX_BRANCHES];
                layer.members.iter().zip(&mut weights).for_each(|(&k, w)| *w = given[k]);
                Rule::Fixed(weights)
            }
        };
        let group = match selection.scope {
            Scope::Token => 0,
            Scope::Group(0) => return Err(Error::Invalid("a group needs 1 token at least".into())),
            Scope::Group(n) => n.min(tokens.max(1)),
            Scope::Layer => tokens,
        };
        Ok(Call {
            tokens,
            width: layer.output,
            blocks: &layer.blocks,
            adapters: &layer.members,
            factors: &layer.factors,
            halves: &layer.halves,
            score: selection.score,
            rule,
            group,
            normalise: selection.normalise,
            exact: self.options.exact,
        })
    }

    fn write_controls(&mut self) -> Result<()> {
        let Backend::Gpu(buffers) = &self.backend else { return Ok(()) };
        let mut controls = Controls {
            inverse_temperature: (1.0 / self.temperature) as f32,
            padding: [0.0; 3],
            strengths: [0.0; MAX_BRANCHES],
        };
        controls.strengths[..self.strengths.len()].copy_from_slice(&self.strengths);
        self.device.gpu()?.write(&buffers.controls, 0, bytemuck::bytes_of(&controls))
    }
}

fn strength(name: &str, value: f64) -> Result<f32> {
    match (value as f32).is_finite() {
        true => Ok(value as f32),
        false => {
            Err(Error::Invalid(format!("the strength of `{name}` is {value}; it must be a finite number")))
        }
    }
}

fn shape(m: RawMatrix<'_>) -> Shape {
    Shape::new(m.rows(), m.cols())
}

fn in_layer(name: &str, error: Error) -> Error {
    match error {
        Error::Invalid(reason) => Error::layer(name, reason),
        other => other,
    }
}

/// The layers of all adapters, with the adapters that have them.
fn members<'a>(adapters: &[Weighted<'a>]) -> Result<BTreeMap<&'a LayerKey, Vec<(usize, &'a Layer)>>> {
    let mut all: BTreeMap<&LayerKey, Vec<(usize, &Layer)>> = BTreeMap::new();
    for (k, weighted) in adapters.iter().enumerate() {
        for layer in weighted.adapter.layers() {
            all.entry(&layer.key).or_default().push((k, layer));
        }
    }
    for of in all.values() {
        let (first, layer) = of[0];
        for &(k, other) in of {
            let (path, other_path) = (adapters[first].adapter.path(), adapters[k].adapter.path());
            if (other.input, other.output) != (layer.input, layer.output) {
                return Err(Error::layer(
                    layer.name(),
                    format!(
                        "{} changes {} inputs into {} outputs, but {} {} into {}; adapters must be for one base model",
                        path.display(),
                        layer.input,
                        layer.output,
                        other_path.display(),
                        other.input,
                        other.output
                    ),
                ));
            }
            if !other.scale.value.is_finite() {
                let scale = other.scale.value;
                let reason = format!("its scale in {} is {scale}; it must be finite", other_path.display());
                return Err(Error::layer(layer.name(), reason));
            }
            if other.a().first_non_finite().or(other.b().first_non_finite()).is_some() {
                let reason = format!("its factors in {} hold NaN or infinity", other_path.display());
                return Err(Error::layer(layer.name(), reason));
            }
        }
    }
    Ok(all)
}

/// Whether B has more bits than the 11 that a half holds; of 16-bit values it has not.
fn has_low(of: &[(usize, &Layer)]) -> bool {
    let b = of.iter().map(|(_, layer)| layer.b()).filter(|b| b.dtype() == Dtype::F32);
    b.flat_map(|b| b.bytes().as_chunks().0).any(|v| u32::from_le_bytes(*v) & branches::LOW_BITS != 0)
}

/// Device memory of a layer's factors.
fn bytes(gpu: &Gpu, of: &[(usize, &Layer)], low: bool) -> u64 {
    let (_, Layer { input, output, .. }) = of[0];
    let rank = || of.iter().map(|(_, layer)| layer.rank);
    let all: usize = rank().sum();
    let row = input.next_multiple_of(4) + output.next_multiple_of(4);
    let halves = Halves::bytes_for(gpu, Shape::new(all, *input), *output, rank(), low);
    (all * row * 4) as u64 + halves
}

impl Resident {
    /// `low`: whether B [has low parts](has_low).
    fn load(device: &Device, of: &[(usize, &Layer)], low: bool) -> Result<Self> {
        let (_, first) = of[0];
        let (input, output) = (first.input, first.output);
        let name = dotted(of.iter().map(|(_, layer)| *layer)).unwrap_or(first).name();
        let (mut blocks, mut factors, mut rank) = (Vec::new(), Vec::new(), 0);
        for (_, layer) in of {
            blocks.push(rank..rank + layer.rank);
            rank += layer.rank;
        }
        let stride = output.next_multiple_of(4);
        let mut resident = Self {
            name,
            input,
            output,
            members: of.iter().map(|(k, _)| *k).collect(),
            blocks,
            factors: Vec::new(),
            batch: Batch::zeros(
                device,
                device.factor(),
                &[Shape::new(rank, input), Shape::new(rank, stride)],
            )?,
            halves: Halves::default(),
            b: Vec::new(),
        };
        if !device.is_gpu() {
            let a: Vec<f64> = of.iter().flat_map(|(_, layer)| layer.a().to_vec::<f64>()).collect();
            resident.batch.host_mut()?[0].copy_from_slice(&a);
            let scaled =
                |layer: &Layer| layer.b().to_vec::<f64>().iter().map(|b| b * layer.scale.value).collect();
            resident.b = of.iter().map(|(_, layer)| scaled(layer)).collect();
            resident.factors = vec![1.0; of.len()];
            return Ok(resident);
        }
        // At powers of two that keep products in f32's range.
        let (mut a, mut b) = (Vec::with_capacity(rank * input), vec![0f32; rank * stride]);
        for ((_, layer), block) in of.iter().zip(&resident.blocks) {
            let (ea, eb) = (exponent(layer.a()), exponent(layer.b()));
            a.extend(layer.a().to_vec::<f32>().iter().map(|v| v * pow2(-ea) as f32));
            for (channel, row) in layer.b().to_vec::<f32>().chunks_exact(layer.rank).enumerate() {
                for (k, v) in block.clone().zip(row) {
                    b[k * stride + channel] = v * pow2(-eb) as f32;
                }
            }
            let factor = (layer.scale.value * pow2(ea) * pow2(eb)) as f32;
            if !factor.is_finite() {
                return Err(Error::layer(layer.name(), "its factors times its scale overflow f32"));
            }
            factors.push(factor);
        }
        resident.factors = factors;
        let gpu = device.gpu()?;
        let arena = resident.batch.binding()?.buffer;
        gpu.write(arena, 0, bytemuck::cast_slice(&a))?;
        gpu.write(arena, resident.batch.offset(1) as u64 * 4, bytemuck::cast_slice(&b))?;
        resident.halves = Halves::new(gpu, &resident.batch, &a, output, &resident.blocks, low)?;
        Ok(resident)
    }
}

fn exponent(matrix: RawMatrix<'_>) -> i32 {
    // Its values were found to be finite.
    power::exponent(matrix).unwrap_or(0)
}
