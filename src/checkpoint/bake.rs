//! Adding adapters to a checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;
use serde::Serialize;
use web_time::Instant;

use super::quantised::{CHUNK, Noise, Round, Stored, Values, fresh_scale, scale_bytes};
use super::read::{Checkpoint, Found, Shard};
use crate::io::atomic::{AtomicFile, AtomicFolder, File, Flusher, free_folder, write_error};
use crate::io::safetensors_file::SafetensorsFile;
use crate::io::{blamed, disk};
use crate::words::count;
use crate::{Adapter, Control, Error, Family, Layer, Result, Weighted};

/// Elements of a weight that one thread changes at a time.
const PIECE: usize = 1 << 18;
/// Bytes that one thread copies at a time.
const COPY: usize = 8 << 20;
/// Metadata that says something of the file's bytes.
const STALE: [&str; 3] = ["modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"];

/// How adapters are added to a checkpoint.
#[derive(Clone, Copy, Debug, Default)]
pub struct BakeOptions {
    /// How sums become numbers of the stored type.
    pub round: Round,
    /// Leave out layers that find no weight, and list them in the report, instead of refusing all.
    pub skip_unmatched: bool,
    /// Whether an existing file is replaced; a folder never is.
    pub overwrite: bool,
}

/// Adapters, and the weights of a checkpoint that they are to be added to: `W' = W + Σ strength · scale · B · A`.
///
/// Types, names, shapes and the order of tensors stay as they are; tensors that no layer adapts are copied. Sums are f32,
/// rounded once to the stored type. Weights of fp8 with a scale are read with it, and written with the same one, or with
/// the least power of two times it that holds the result: numbers that do not change then stay the same to the bit.
pub struct Bake<'a> {
    checkpoint: &'a Checkpoint,
    adapters: Vec<Weighted<'a>>,
    options: BakeOptions,
    found: Vec<Found<'a>>,
    /// What is added to each weight, in order of the rows.
    updates: BTreeMap<usize, Vec<Segment<'a>>>,
    layers: Vec<Target>,
    unmatched: Vec<String>,
}

/// A layer of the report.
struct Target {
    name: String,
    found: usize,
}

/// Rows of a weight, and what is added to them.
struct Segment<'a> {
    rows: Range<usize>,
    /// Of [`Bake::layers`].
    target: usize,
    terms: Vec<Term<'a>>,
}

/// What is added to a weight: rows, and a layer.
type Added<'a> = Vec<(Range<usize>, Term<'a>)>;

/// A layer at a strength, from one of its rows on.
#[derive(Clone, Copy)]
struct Term<'a> {
    layer: &'a Layer,
    factor: f64,
    row: usize,
}

/// How much of an update is in the weights after rounding: Frobenius norms and what they tell.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Survival {
    /// ‖ΔW‖, what was to be added.
    pub asked: f64,
    /// ‖W' − W‖, what the weights changed by.
    pub arrived: f64,
    /// The cosine of the two: 1 for all of it, 0 for nothing but noise, or nothing.
    pub correlation: f64,
    /// ‖(W' − W) − ΔW‖ / ‖ΔW‖.
    pub error: f64,
}

/// What became of a layer.
#[derive(Clone, Debug, Serialize)]
pub struct BakedLayer {
    /// The layer's name in its adapter.
    pub layer: String,
    /// The tensor that it was added to, or to some rows of which.
    pub tensor: String,
    /// The type of the tensor.
    pub dtype: &'static str,
    /// How much of it is there.
    #[serde(flatten)]
    pub survival: Survival,
}

/// What a bake did.
#[derive(Clone, Debug, Serialize)]
pub struct BakeReport {
    /// The model, as far as is known.
    pub family: String,
    /// How much of the whole update is there.
    #[serde(flatten)]
    pub survival: Survival,
    /// Tensors that changed.
    pub tensors: usize,
    /// Scales of fp8 weights that had to grow.
    pub scales: usize,
    /// Layers that found no weight and were left out.
    pub left_out: Vec<String>,
    /// Each layer.
    pub layers: Vec<BakedLayer>,
    /// Bytes that were written.
    pub bytes: u64,
    /// Wall time.
    pub seconds: f64,
}

impl<'a> Bake<'a> {
    /// Finds the weight of every layer, and checks shapes and types. Nothing is computed yet.
    ///
    /// # Errors
    /// [`Error::Invalid`] without adapters, or for a strength that is not finite; [`Error::File`] for an adapter of another
    /// model; [`Error::Layer`] for layers that find no weight (the error lists them), more than one, or one of another
    /// shape; [`Error::Tensor`] for weights in a quantisation that is not supported.
    pub fn new(checkpoint: &'a Checkpoint, adapters: &[Weighted<'a>], options: &BakeOptions) -> Result<Self> {
        if adapters.is_empty() {
            return Err(Error::Invalid("there is no adapter to add to the checkpoint".into()));
        }
        if let Some(bad) = adapters.iter().find(|of| !of.strength.is_finite()) {
            let name = bad.adapter.name();
            return Err(Error::Invalid(format!(
                "the strength of `{name}` is {}; it has to be finite",
                bad.strength
            )));
        }
        let found = checkpoint.found(family(checkpoint, adapters)?);
        let mut bake = Self {
            checkpoint,
            adapters: adapters.to_vec(),
            options: *options,
            found,
            updates: BTreeMap::new(),
            layers: Vec::new(),
            unmatched: Vec::new(),
        };
        let terms = bake.matched()?;
        bake.refuse_unmatched()?;
        for (found, terms) in terms {
            bake.cut(found, terms);
        }
        Ok(bake)
    }

    /// Layers that find no weight, by name; there are none unless they are to be left out.
    pub fn left_out(&self) -> &[String] {
        &self.unmatched
    }

    /// The terms of each weight, and the rows that they are added to.
    fn matched(&mut self) -> Result<BTreeMap<usize, Added<'a>>> {
        let places = Checkpoint::places(&self.found);
        let mut all: BTreeMap<usize, Added<'a>> = BTreeMap::new();
        for Weighted { adapter, strength } in self.adapters.clone() {
            for layer in adapter.layers() {
                let places = places.get(layer.key()).map(Vec::as_slice).unwrap_or_default();
                let [place] = places else {
                    if let [first, second, ..] = places {
                        let name = |found: usize| self.found[found].tensor.name;
                        let reason = format!(
                            "may be of `{}` and of `{}` of {}, and which is meant is not known",
                            name(first.found),
                            name(second.found),
                            self.checkpoint.path().display()
                        );
                        return Err(Error::layer(layer.name(), reason));
                    }
                    self.unmatched.push(layer.name());
                    continue;
                };
                let found = &self.found[place.found];
                if !all.contains_key(&place.found) {
                    found.checked()?;
                }
                let part = &place.part;
                let shape = (part.rows.len(), found.weight.widths.0);
                let (kernel, own) = (layer.kernel(), found.kernel());
                let kernels = kernel.is_empty() || own.is_empty() || kernel == own;
                if shape != (layer.output(), layer.input()) || !kernels {
                    let reason = format!(
                        "its update in {} is {} x {}{}, but `{}` has {} x {}{} for it; is it for another model?",
                        adapter.path().display(),
                        layer.output(),
                        layer.input(),
                        of_kernel(kernel),
                        found.tensor.name,
                        shape.0,
                        shape.1,
                        of_kernel(own),
                    );
                    return Err(Error::layer(layer.name(), reason));
                }
                let term = Term { layer, factor: strength * layer.scale().value, row: 0 };
                let terms = all.entry(place.found).or_default();
                let (rows, half) = (part.rows.clone(), part.rows.len() / 2);
                if found.transposed {
                    terms.push((0..found.weight.widths.0, term));
                } else if part.swapped {
                    let middle = rows.start + half;
                    terms.push((rows.start..middle, Term { row: rows.len() - half, ..term }));
                    terms.push((middle..rows.end, term));
                } else {
                    terms.push((rows, term));
                }
            }
        }
        Ok(all)
    }

    fn refuse_unmatched(&self) -> Result<()> {
        const SHOWN: usize = 8;
        let layers: usize = self.adapters.iter().map(|of| of.adapter.layers().len()).sum();
        let Some(first) = self.unmatched.first() else { return Ok(()) };
        let none = self.unmatched.len() == layers;
        if self.options.skip_unmatched && !none {
            return Ok(());
        }
        let names: Vec<String> = self.unmatched.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
        let more = match self.unmatched.len().saturating_sub(SHOWN) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let uncut = self.found.iter().find_map(|of| Some((of.tensor.name, of.parts.as_ref().err()?)));
        let why = uncut.map_or_else(String::new, |(name, why)| format!(" (`{name}` {why})"));
        let hint = match none {
            true => "is it for another model, or does the checkpoint lack that part?",
            false => "`--skip-unmatched` leaves them out",
        };
        Err(Error::layer(
            first,
            format!(
                "{} of {layers} layers find no weight in {}, which is {}: {}{more}{why}; {hint}",
                self.unmatched.len(),
                self.checkpoint.path().display(),
                match self.checkpoint.family() {
                    Family::UNKNOWN => "of no known model".to_owned(),
                    family => family.to_string(),
                },
                names.join(", "),
            ),
        ))
    }

    /// Cuts the rows of a weight where terms begin and end.
    fn cut(&mut self, found: usize, terms: Added<'a>) {
        let edges: BTreeSet<usize> = terms.iter().flat_map(|(rows, _)| [rows.start, rows.end]).collect();
        let edges: Vec<usize> = edges.into_iter().collect();
        let mut segments: Vec<Segment<'a>> = Vec::new();
        for pair in edges.windows(2) {
            let rows = pair[0]..pair[1];
            let over = terms.iter().filter(|(of, _)| of.start <= rows.start && rows.end <= of.end);
            let terms: Vec<Term<'a>> =
                over.map(|(of, term)| Term { row: term.row + rows.start - of.start, ..*term }).collect();
            let Some(first) = terms.first() else { continue };
            let name = first.layer.name();
            let known = self.layers.iter().rposition(|of| of.found == found && of.name == name);
            let target = known.unwrap_or_else(|| {
                self.layers.push(Target { name, found });
                self.layers.len() - 1
            });
            segments.push(Segment { rows, target, terms });
        }
        self.updates.insert(found, segments);
    }

    /// Writes the sum, whole or not at all: a file for a file, and a folder for a folder, with everything else that is in it.
    ///
    /// # Errors
    /// [`Error::File`] if the output exists (and, for a file, is not to be replaced) or is an input; [`Error::Tensor`] and
    /// [`Error::Layer`] for values that are not finite, or too large for the stored type; [`Error::Io`];
    /// [`Error::Cancelled`].
    pub fn save(&self, path: impl AsRef<Path>, control: &Control<'_>) -> Result<BakeReport> {
        blamed(self.write_all(path.as_ref(), control), || self.check_inputs())
    }

    fn write_all(&self, path: &Path, control: &Control<'_>) -> Result<BakeReport> {
        let start = Instant::now();
        self.check_output(path)?;
        let adapters: Vec<&Adapter> = self.adapters.iter().map(|of| of.adapter).collect();
        adapters.iter().try_for_each(|adapter| adapter.check_finite_with(control))?;
        let mut done =
            Done { sums: vec![Sums::default(); self.layers.len()], tensors: 0, scales: 0, bytes: 0 };
        let Some(root) = &self.checkpoint.root else {
            let shard = &self.checkpoint.shards[0];
            let file = AtomicFile::create(path, self.options.overwrite, &self.inputs())?;
            let flusher = Flusher::new(&file, shard.file.size());
            self.write(0, shard, path, file.file(), &|bytes| flusher.wrote(bytes), control, &mut done)?;
            flusher.finish().map_err(|e| write_error(path, e))?;
            control.check()?;
            self.check_inputs()?;
            file.commit(path)?;
            return Ok(self.report(done, start));
        };
        let folder = AtomicFolder::create(path)?;
        let create = |relative: &Path| -> Result<PathBuf> {
            let to = folder.path().join(relative);
            to.parent()
                .map_or(Ok(()), disk::create_folder)
                .map_err(|e| Error::io(path, "create a folder in it", e))?;
            Ok(to)
        };
        for (i, shard) in self.checkpoint.shards.iter().enumerate() {
            let file = File::create_new(&create(&shard.relative)?)
                .map_err(|e| Error::io(path, "create a file in it", e))?;
            self.write(i, shard, path, &file, &|_| (), control, &mut done)?;
            file.sync_all().map_err(|e| write_error(path, e))?;
        }
        for relative in &self.checkpoint.beside {
            control.check()?;
            let from = root.join(relative);
            let copied = disk::copy(&from, &create(relative)?).map_err(|e| Error::io(&from, "copy", e))?;
            done.bytes += copied;
        }
        self.check_inputs()?;
        folder.commit(path)?;
        Ok(self.report(done, start))
    }

    /// Checks before long work what [`save`](Self::save) will check again.
    ///
    /// # Errors
    /// [`Error::File`] if the output exists (and, for a file, is not to be replaced), is an input, or is in the
    /// checkpoint's own folder.
    pub fn check_output(&self, path: &Path) -> Result<()> {
        let Some(root) = &self.checkpoint.root else {
            return crate::adapter::check_target(path, self.options.overwrite, &self.inputs());
        };
        let (_, folder) = free_folder(path)?;
        let real = |path: &Path| fs::canonicalize(path).ok();
        if let (Some(root), Some(folder)) = (real(root), real(&folder))
            && folder.starts_with(&root)
        {
            return Err(Error::file(
                path,
                "lies in the checkpoint's own folder; choose a place outside of it",
            ));
        }
        Ok(())
    }

    /// Fails if an input has changed since it was opened.
    fn check_inputs(&self) -> Result<()> {
        self.checkpoint.check_files()?;
        self.adapters.iter().try_for_each(|of| of.adapter.check_file())
    }

    /// Files that are read.
    fn inputs(&self) -> Vec<PathBuf> {
        let adapters = self.adapters.iter().map(|of| of.adapter.path());
        self.checkpoint.files().chain(adapters).map(Path::to_owned).collect()
    }

    fn metadata(&self, shard: &Shard) -> BTreeMap<String, String> {
        let mut metadata = shard.file.metadata().clone();
        STALE.iter().for_each(|key| drop(metadata.remove(*key)));
        let baked: Vec<String> =
            self.adapters.iter().map(|of| format!("{}:{}", of.adapter.name(), of.strength)).collect();
        // What was baked before is still in there.
        let before = metadata.remove("loraweld.baked").map(|before| before + ", ").unwrap_or_default();
        metadata.insert("loraweld.baked".into(), before + &baked.join(", "));
        metadata.insert("loraweld.version".into(), env!("CARGO_PKG_VERSION").into());
        metadata
    }

    /// Writes one file: everything where it was, behind the new header.
    #[allow(clippy::too_many_arguments, reason = "a file and what is told of it, once")]
    fn write(
        &self,
        index: usize,
        shard: &Shard,
        path: &Path,
        out: &File,
        wrote: &(dyn Fn(u64) + Sync),
        control: &Control<'_>,
        done: &mut Done,
    ) -> Result<()> {
        let failed = |e| write_error(path, e);
        let (header, start) = shard.file.header_with(&self.metadata(shard)).map_err(failed)?;
        let length = header.len() as u64 + shard.file.size() - start;
        out.set_size(length).and_then(|()| out.write_at(&header, 0)).map_err(failed)?;
        let target = Writer { path, out, wrote, control, shift: header.len() as i64 - start as i64 };
        let mut changed: Vec<(Range<u64>, usize, &Vec<Segment<'a>>)> = self
            .updates
            .iter()
            .filter(|(found, _)| self.found[**found].shard == index)
            .filter_map(|(i, segments)| Some((shard.file.place(self.found[*i].tensor.name)?, *i, segments)))
            .collect();
        changed.sort_by_key(|(place, _, _)| place.start);
        let (mut next, mut scales) = (start, Vec::new());
        for (place, i, segments) in &changed {
            let found = &self.found[*i];
            control.step("bake", found.tensor.name, done.tensors, self.updates.len())?;
            target.copy(&shard.file, next..place.start)?;
            next = place.end;
            let values = found.values()?;
            let factored: Vec<Factored> =
                segments.par_iter().map(|segment| Factored::new(segment, found.transposed)).collect();
            let grown = self.grown(&values, &factored)?;
            let sums = self.change(&values, segments, &factored, grown.as_deref(), place.start, &target)?;
            for (segment, sum) in segments.iter().zip(&sums) {
                done.sums[segment.target].add(sum);
            }
            if let (Some(grown), Some(scale)) = (grown, &values.scale)
                && let Some(place) = shard.file.place(scale.tensor.name)
            {
                done.scales += 1;
                scales.push((place, scale_bytes(scale.stored, &grown)));
            }
            done.tensors += 1;
        }
        target.copy(&shard.file, next..shard.file.size())?;
        // Over the old ones, which were copied with what is around them.
        scales.iter().try_for_each(|(place, bytes)| target.put(bytes, place.start))?;
        done.bytes += length;
        control.finish("bake", self.updates.len());
        Ok(())
    }

    /// The scales of a weight of fp8 if the old ones are too small for what it becomes.
    fn grown(&self, values: &Values<'_>, factored: &[Factored]) -> Result<Option<Vec<f32>>> {
        let Some(scale) = values.scale.as_ref().filter(|_| values.stored.is_fp8()) else { return Ok(None) };
        let largest = |of: &Factored| -> Vec<(usize, f32)> {
            let pieces: Vec<Range<usize>> = of.pieces(values.cols);
            let of_piece = |scratch: &mut Scratch, rows: Range<usize>| {
                of.delta(values, rows.clone(), scratch);
                let (mut all, mut w) = (Vec::with_capacity(rows.len()), [0f32; CHUNK]);
                for (row, delta) in rows.zip(scratch.delta.chunks(values.cols.max(1))) {
                    let mut most = 0f32;
                    for (col, delta) in delta.chunks(CHUNK).enumerate() {
                        let w = &mut w[..delta.len()];
                        values.read(row, col * CHUNK, w);
                        most = w.iter().zip(delta).fold(most, |most, (w, d)| most.max((w + d).abs()));
                    }
                    all.push((row, most));
                }
                all
            };
            pieces.into_par_iter().map_init(Scratch::default, of_piece).flatten().collect()
        };
        let mut grown = scale.values.clone();
        for (row, most) in factored.iter().flat_map(largest) {
            let scale = &mut grown[if scale.values.len() == 1 { 0 } else { row }];
            *scale = fresh_scale(*scale, most, values.stored);
        }
        if let Some(bad) = grown.iter().find(|v| **v > scale.stored.max()) {
            let reason =
                format!("would have to become {bad:e}, which is too large for {}", scale.stored.name());
            return Err(Error::tensor(values.path, scale.tensor.name, reason));
        }
        Ok((grown != scale.values).then_some(grown))
    }

    /// Writes a weight with its updates; gives the sums of each of its segments.
    fn change(
        &self,
        values: &Values<'_>,
        segments: &[Segment<'_>],
        factored: &[Factored],
        grown: Option<&[f32]>,
        place: u64,
        target: &Writer<'_>,
    ) -> Result<Vec<Sums>> {
        let noise = (self.options.round == Round::Stochastic).then(|| Noise::of(values.tensor.name));
        let row_bytes = values.cols * values.stored.size();
        let one = |factored: &Factored, of: Option<&Segment<'_>>| -> Result<Sums> {
            let piece = |scratch: &mut Scratch, rows: Range<usize>| {
                target.control.check()?;
                factored.delta(values, rows.clone(), scratch);
                let sums = scratch.sum(values, rows.clone(), grown, noise.filter(|_| of.is_some()));
                if !sums.fits {
                    return Err(unfit(values, rows, &scratch.delta, of));
                }
                target.put(&scratch.bytes, place + (rows.start * row_bytes) as u64)?;
                Ok(sums)
            };
            let pieces = factored.pieces(values.cols).into_par_iter();
            let all: Vec<Sums> = pieces.map_init(Scratch::default, piece).collect::<Result<_>>()?;
            // In order, so that the sum is the same every time.
            Ok(all.iter().fold(Sums::default(), |mut sum, piece| {
                sum.add(piece);
                sum
            }))
        };
        let mut next = 0;
        let last = values.tensor.shape.first().copied().unwrap_or(0);
        let ends = segments.iter().map(|segment| segment.rows.clone()).chain(std::iter::once(last..last));
        for rows in ends {
            let gap = next..rows.start;
            next = rows.end;
            if !gap.is_empty() && grown.is_some() {
                one(&Factored::nothing(gap), None)?;
            } else if !gap.is_empty() {
                let bytes = &values.bytes[gap.start * row_bytes..gap.end * row_bytes];
                target.put_all(bytes, place + (gap.start * row_bytes) as u64)?;
            }
        }
        segments.iter().zip(factored).map(|(segment, factored)| one(factored, Some(segment))).collect()
    }

    fn report(&self, done: Done, start: Instant) -> BakeReport {
        let mut whole = Sums::default();
        done.sums.iter().for_each(|sums| whole.add(sums));
        let layer = |(target, sums): (&Target, &Sums)| {
            let tensor = &self.found[target.found].tensor;
            BakedLayer {
                layer: target.name.clone(),
                tensor: tensor.name.to_owned(),
                dtype: Stored::of(tensor.dtype).map_or("", Stored::name),
                survival: sums.survival(),
            }
        };
        BakeReport {
            family: self.checkpoint.family().to_string(),
            survival: whole.survival(),
            tensors: done.tensors,
            scales: done.scales,
            left_out: self.unmatched.clone(),
            layers: self.layers.iter().zip(&done.sums).map(layer).collect(),
            bytes: done.bytes,
            seconds: start.elapsed().as_secs_f64(),
        }
    }
}

/// The family that the checkpoint and all adapters are of.
fn family(checkpoint: &Checkpoint, adapters: &[Weighted<'_>]) -> Result<Family> {
    let mut family = checkpoint.family();
    for Weighted { adapter, .. } in adapters {
        let own = adapter.family();
        match (family.and(own), own) {
            (_, Family::UNKNOWN) => {}
            (Family::UNKNOWN, _) if family != Family::UNKNOWN => {
                let reason = format!(
                    "is for {own}, but {} is {family}; `--model` tells which they are of, if this is wrong",
                    checkpoint.path().display()
                );
                return Err(Error::file(adapter.path(), reason));
            }
            (Family::UNKNOWN, own) => family = own,
            (both, _) => family = both,
        }
    }
    Ok(family)
}

fn of_kernel(kernel: &[usize]) -> String {
    match kernel {
        [] => String::new(),
        kernel => {
            format!(" (kernel {})", kernel.iter().map(usize::to_string).collect::<Vec<_>>().join(" x "))
        }
    }
}

/// What was done so far.
struct Done {
    sums: Vec<Sums>,
    tensors: usize,
    scales: usize,
    bytes: u64,
}

/// The file that is written.
struct Writer<'a> {
    path: &'a Path,
    out: &'a File,
    wrote: &'a (dyn Fn(u64) + Sync),
    control: &'a Control<'a>,
    /// How much further back everything is than in the input.
    shift: i64,
}

impl Writer<'_> {
    /// Writes bytes where `place` of the input was.
    fn put(&self, bytes: &[u8], place: u64) -> Result<()> {
        let place = place.wrapping_add_signed(self.shift);
        self.out.write_at(bytes, place).map_err(|e| write_error(self.path, e))?;
        (self.wrote)(bytes.len() as u64);
        Ok(())
    }

    /// As [`put`](Self::put), side by side.
    fn put_all(&self, bytes: &[u8], place: u64) -> Result<()> {
        bytes.par_chunks(COPY).enumerate().try_for_each(|(i, chunk)| {
            self.control.check()?;
            self.put(chunk, place + (i * COPY) as u64)
        })
    }

    /// Copies a part of the input.
    fn copy(&self, input: &SafetensorsFile, place: Range<u64>) -> Result<()> {
        let starts: Vec<u64> = place.clone().step_by(COPY).collect();
        starts.into_par_iter().try_for_each(|start| {
            self.control.check()?;
            self.put(&input.read(start..place.end.min(start + COPY as u64))?, start)
        })
    }
}

/// What is added to some rows, as `B · A` in f32.
struct Factored {
    rows: Range<usize>,
    rank: usize,
    /// rows x rank, row by row, with all factors.
    b: Vec<f32>,
    /// rank x columns, row by row.
    a: Vec<f32>,
}

impl Factored {
    fn nothing(rows: Range<usize>) -> Self {
        Self { rows, rank: 0, b: Vec::new(), a: Vec::new() }
    }

    fn new(segment: &Segment<'_>, transposed: bool) -> Self {
        let rows = segment.rows.len();
        let rank: usize = segment.terms.iter().map(|term| term.layer.rank()).sum();
        let mut b = vec![0f32; rows * rank];
        let mut a = Vec::new();
        let mut start = 0;
        for Term { layer, factor, row } in &segment.terms {
            let own = layer.rank();
            // Of a weight that is stored transposed, Aᵀ · Bᵀ is added.
            let (left, right): (Vec<f32>, Vec<f32>) = match transposed {
                false => (layer.b().row_range(*row, row + rows).to_vec(), layer.a().to_vec()),
                true => {
                    let [of_a, of_b]: [Vec<f32>; 2] = [layer.a().to_vec(), layer.b().to_vec()];
                    let (inputs, outputs) = (layer.input(), layer.output());
                    let left = (0..rows).flat_map(|i| (0..own).map(move |k| (i + row, k)));
                    let left = left.map(|(i, k)| of_a[k * inputs + i]).collect();
                    let right = (0..own).flat_map(|k| (0..outputs).map(move |j| (k, j)));
                    (left, right.map(|(k, j)| of_b[j * own + k]).collect())
                }
            };
            for (to, from) in b.chunks_exact_mut(rank.max(1)).zip(left.chunks_exact(own.max(1))) {
                let to = &mut to[start..start + own];
                to.iter_mut().zip(from).for_each(|(to, v)| *to = (f64::from(*v) * factor) as f32);
            }
            a.extend(right);
            start += own;
        }
        Self { rows: segment.rows.clone(), rank, b, a }
    }

    /// Rows that are done at a time.
    fn pieces(&self, cols: usize) -> Vec<Range<usize>> {
        let step = (PIECE / cols.max(1)).max(1);
        self.rows.clone().step_by(step).map(|start| start..(start + step).min(self.rows.end)).collect()
    }

    /// The update of some rows, in `scratch.delta`.
    fn delta(&self, values: &Values<'_>, rows: Range<usize>, scratch: &mut Scratch) {
        let (cols, rank) = (values.cols, self.rank);
        scratch.delta.clear();
        scratch.delta.resize(rows.len() * cols, 0.0);
        if rank == 0 {
            return;
        }
        let first = rows.start - self.rows.start;
        let b = &self.b[first * rank..(first + rows.len()) * rank];
        matmul(
            MatMut::from_row_major_slice_mut(&mut scratch.delta, rows.len(), cols),
            Accum::Replace,
            MatRef::from_row_major_slice(b, rows.len(), rank),
            MatRef::from_row_major_slice(&self.a, rank, cols),
            1.0f32,
            Par::Seq,
        );
    }
}

/// What a thread writes into.
#[derive(Default)]
struct Scratch {
    delta: Vec<f32>,
    bytes: Vec<u8>,
}

impl Scratch {
    /// Adds `self.delta` to rows of a weight, and rounds: `self.bytes` is what is to be written.
    fn sum(
        &mut self,
        values: &Values<'_>,
        rows: Range<usize>,
        grown: Option<&[f32]>,
        noise: Option<Noise>,
    ) -> Sums {
        let (mut before, mut after) = ([0f32; CHUNK], [0f32; CHUNK]);
        let (size, cols) = (values.stored.size(), values.cols.max(1));
        self.bytes.resize(rows.len() * values.cols * size, 0);
        let mut sums = Sums::default();
        let lines = self.delta.chunks(cols).zip(self.bytes.chunks_mut(cols * size));
        for (row, (delta, bytes)) in rows.zip(lines) {
            let scale = values.scale.as_ref().map(|old| match grown {
                Some([all]) => *all,
                Some(grown) => grown[row],
                None => old.of_row(row),
            });
            let max = values.stored.max() * scale.unwrap_or(1.0);
            for (i, (delta, bytes)) in delta.chunks(CHUNK).zip(bytes.chunks_mut(CHUNK * size)).enumerate() {
                let (before, after) = (&mut before[..delta.len()], &mut after[..delta.len()]);
                values.read(row, i * CHUNK, before);
                after.iter_mut().zip(&*before).zip(delta).for_each(|((to, w), d)| *to = w + d);
                values.write(row, i * CHUNK, scale, noise, after, bytes);
                // No number is larger than the largest; NaN is not smaller either.
                sums.fits &= after.iter().fold(true, |fits, v| fits & (v.abs() <= max));
                sums.compare(before, delta, after);
            }
        }
        sums
    }
}

/// Squares and products of what was asked for and what arrived.
#[derive(Clone, Copy)]
struct Sums {
    asked: f64,
    arrived: f64,
    product: f64,
    error: f64,
    fits: bool,
}

impl Default for Sums {
    fn default() -> Self {
        Self { asked: 0.0, arrived: 0.0, product: 0.0, error: 0.0, fits: true }
    }
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.asked += other.asked;
        self.arrived += other.arrived;
        self.product += other.product;
        self.error += other.error;
        self.fits &= other.fits;
    }

    /// Adds those of a few elements: sums of each in f32, of all in f64.
    fn compare(&mut self, before: &[f32], delta: &[f32], after: &[f32]) {
        const LANES: usize = 8;
        let mut lanes = [[0f32; LANES]; 4];
        let mut add = |lane: usize, w: f32, d: f32, s: f32| {
            let arrived = s - w;
            let error = arrived - d;
            lanes[0][lane] += d * d;
            lanes[1][lane] += arrived * arrived;
            lanes[2][lane] += d * arrived;
            lanes[3][lane] += error * error;
        };
        let ((w, w_rest), (d, d_rest)) = (before.as_chunks::<LANES>(), delta.as_chunks::<LANES>());
        let (s, s_rest) = after.as_chunks::<LANES>();
        for ((w, d), s) in w.iter().zip(d).zip(s) {
            for lane in 0..LANES {
                add(lane, w[lane], d[lane], s[lane]);
            }
        }
        for ((w, d), s) in w_rest.iter().zip(d_rest).zip(s_rest) {
            add(0, *w, *d, *s);
        }
        let mut sums = lanes.map(|lanes| lanes.iter().map(|v| f64::from(*v)).sum::<f64>());
        // Squares of the very small and the very large are no f32.
        if !sums.iter().all(|sum| (1e-25..1e30).contains(&sum.abs())) {
            sums = [0.0; 4];
            for ((w, d), s) in before.iter().zip(delta).zip(after) {
                let (d, arrived) = (f64::from(*d), f64::from(*s) - f64::from(*w));
                let all = [d * d, arrived * arrived, d * arrived, (arrived - d) * (arrived - d)];
                sums.iter_mut().zip(all).for_each(|(sum, v)| *sum += v);
            }
        }
        self.asked += sums[0];
        self.arrived += sums[1];
        self.product += sums[2];
        self.error += sums[3];
    }

    fn survival(&self) -> Survival {
        let (asked, arrived) = (self.asked.sqrt(), self.arrived.sqrt());
        let correlation = if asked * arrived > 0.0 { self.product / (asked * arrived) } else { 0.0 };
        let nothing = asked == 0.0;
        Survival {
            asked,
            arrived,
            correlation: if nothing { 1.0 } else { correlation.clamp(-1.0, 1.0) },
            error: if nothing { 0.0 } else { self.error.sqrt() / asked },
        }
    }
}

/// What is wrong with a sum that the type does not have.
fn unfit(values: &Values<'_>, rows: Range<usize>, delta: &[f32], segment: Option<&Segment<'_>>) -> Error {
    let mut line = vec![0f32; values.cols];
    let name = values.tensor.name;
    let layer =
        segment.and_then(|s| s.terms.first()).map_or_else(|| name.to_owned(), |term| term.layer.name());
    let mut largest = (0f32, 0, 0);
    for (row, delta) in rows.zip(delta.chunks(values.cols.max(1))) {
        values.read(row, 0, &mut line);
        for (col, (w, d)) in line.iter().zip(delta).enumerate() {
            if !w.is_finite() {
                let reason =
                    format!("row {row}, column {col} is {w}; every weight that is changed must be finite");
                return Error::tensor(values.path, name, reason);
            }
            if !d.is_finite() {
                let reason = format!(
                    "its update at row {row}, column {col} of `{name}` is {d}; is the strength too large?"
                );
                return Error::layer(layer, reason);
            }
            if (w + d).abs() > largest.0 {
                largest = ((w + d).abs(), row, col);
            }
        }
    }
    let (value, row, col) = largest;
    let reason = format!(
        "row {row}, column {col} of `{name}` would become {value:e}, which is too large for {}; use a smaller strength",
        values.stored.name()
    );
    Error::layer(layer, reason)
}

impl fmt::Display for BakeReport {
    /// What was done, and the layers of which the rounding lets the least through.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 3;
        let Survival { correlation, asked, arrived, .. } = self.survival;
        let share = if asked > 0.0 { 100.0 * arrived / asked } else { 100.0 };
        let types: BTreeSet<&str> = self.layers.iter().map(|layer| layer.dtype).collect();
        let types: Vec<&str> = types.into_iter().collect();
        write!(
            f,
            "{} in {} ({}): after rounding, the update has correlation {correlation:.4} with the one that \
             was asked for, and {share:.1} % of its norm",
            count(self.layers.len(), "layer"),
            count(self.tensors, "tensor"),
            types.join(", ")
        )?;
        if self.scales > 0 {
            write!(f, "; {} grew to hold it", count(self.scales, "scale"))?;
        }
        let mut worst: Vec<&BakedLayer> =
            self.layers.iter().filter(|layer| layer.survival.correlation < 0.99).collect();
        worst.sort_by(|x, y| x.survival.correlation.total_cmp(&y.survival.correlation));
        for layer in worst.iter().take(SHOWN) {
            let Survival { correlation, .. } = layer.survival;
            write!(f, "\n  least: {correlation:.4} of `{}` ({})", layer.layer, layer.dtype)?;
        }
        if worst.len() > SHOWN {
            write!(f, "\n  and {} below 0.99", count(worst.len() - SHOWN, "more layer"))?;
        }
        if !self.left_out.is_empty() {
            write!(
                f,
                "\nleft out, without a weight in the checkpoint: {}",
                count(self.left_out.len(), "layer")
            )?;
        }
        Ok(())
    }
}
