//! Records of model families: what `*.names` files say, and how a module's name is looked up in them.
//!
//! The names were obtained by running the model classes and loaders of diffusers 0.42.1 and ComfyUI 0.33; none is
//! derived from another by a rule. A record has a line for each property and then a table with a line for each module:
//!
//! ```text
//! diffusers                       native                             blocks  marked   shapes      others
//! transformer_blocks.{}.attn.to_q double_blocks.{}.img_attn.qkv[0]   0-18    c        3072>3072   transformer_blocks.{}.attn.to_qkv[0]
//! norm_out.linear                 final_layer.adaLN_modulation.1~    -       c        3072>6144
//! ```
//!
//! `{}` stands for the number of a block, and `blocks` for the numbers that there are. `name[i]` is the `i`-th part of the
//! rows of a module that fuses several. `name~` has the two halves of its rows the other way round. `-` is no name, and
//! `component:name` is in another component than the main model. Shapes are `inputs>outputs`, with `k1x2x2` for the
//! kernel of a convolution; where the models of a family differ, there is one for each, and `.` for a model that lacks
//! the module. `c` marks the modules that are meant by what loaders take of `c` alone.

use std::collections::HashMap;
use std::sync::LazyLock;

/// Whose names a module has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::adapter) enum Names {
    Diffusers,
    /// Of the model's own code, which ComfyUI has.
    Native,
    /// XLabs' attention processors.
    Xlabs,
    /// Of some other trainer or of an older version; read only.
    Other,
}

/// A model family.
pub(in crate::adapter) struct Record {
    /// The name of its file, without the extension.
    pub id: &'static str,
    pub name: &'static str,
    /// How metadata begins that names it.
    pub words: Vec<&'static str>,
    /// The models whose shapes differ.
    pub models: Vec<&'static str>,
    /// Whose names kohya's spelling has.
    pub kohya: Names,
    /// Whose names kohya's own tools have: those that are written, and others.
    pub kohya_takes: Vec<Names>,
    /// Whether loaders take native names without a prefix.
    pub bfl: bool,
    /// Whether XLabs' processors exist for it.
    pub xlabs: bool,
    /// Whether ComfyUI takes the parts of fused modules by the names of diffusers after `diffusion_model.`.
    pub split: bool,
    /// `ss_base_model_version` of kohya's files.
    pub base: Option<&'static str>,
    /// `ss_network_module` of kohya's files.
    pub module: Option<&'static str>,
    pub encoders: Vec<Encoder>,
    /// A letter and the name of each list of blocks.
    pub stacks: Vec<(&'static str, &'static str)>,
    /// What ComfyUI takes, with any suffix, and diffusers.
    pub comfyui_takes: Vec<Taken>,
    pub diffusers_takes: Vec<Taken>,
    pub rows: Vec<Row>,
    pub fused: Vec<Fused>,
    /// Rows and names by [`pattern`].
    index: HashMap<Box<str>, Vec<(u16, u8)>>,
}

/// What a loader was seen to take whole.
pub(in crate::adapter) struct Taken {
    pub names: Names,
    pub prefix: &'static str,
    /// Suffixes of the factors, and whether there are alphas: `peft`, `peft+alpha`, `kohya`, `kohya+alpha`, `old`,
    /// `peft_default`. None for any.
    pub suffix: Option<&'static str>,
    pub which: Which,
}

/// Which modules a loader takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::adapter) enum Which {
    All,
    /// A file of nothing but modules of blocks.
    Blocks,
    /// Those that are marked so in the table.
    Marked,
    /// A file of nothing but modules of blocks, those that are marked.
    MarkedBlocks,
}

/// A text encoder.
pub(in crate::adapter) struct Encoder {
    /// What layers' keys call it.
    pub component: &'static str,
    /// Its name in a pipeline of diffusers.
    pub diffusers: &'static str,
    /// Its name in ComfyUI.
    pub comfyui: &'static str,
    /// kohya's prefixes: the one that is written, and others that ComfyUI takes.
    pub kohya: Vec<&'static str>,
}

/// A module.
pub(in crate::adapter) struct Row {
    /// Of the main model if it is empty.
    pub component: &'static str,
    /// The first is the one that layers are matched by.
    pub names: Vec<Name>,
    /// For each model.
    pub shapes: Vec<Option<Shape>>,
    /// For each model, the numbers that each `{}` stands for.
    blocks: Vec<Vec<Vec<(u32, u32)>>>,
    /// Whether it is one of those that [`Which::Marked`] means.
    pub marked: bool,
}

pub(in crate::adapter) struct Name {
    pub of: Names,
    pub path: &'static str,
    /// Which part of the module it is, and of which of the record's fused modules.
    pub part: Option<(usize, usize)>,
    /// Whether the halves of its rows are the other way round than those of the first name.
    pub swap: bool,
    /// Numbers in the name; `None` stands for that of a block.
    numbers: Vec<Option<u32>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::adapter) struct Shape {
    /// Without the kernel.
    pub input: usize,
    pub output: usize,
    pub kernel: Vec<usize>,
}

impl Shape {
    /// Columns of the module's matrix.
    pub fn columns(&self) -> usize {
        self.input * self.kernel.iter().product::<usize>()
    }
}

/// A module that holds several of the table, one above the other: their A is one, and B is cut into rows.
#[derive(Debug)]
pub(in crate::adapter) struct Fused {
    pub path: &'static str,
    /// The paths of its parts, by which layers are matched.
    pub parts: Vec<&'static str>,
    /// For each model, the inputs and the rows of each part; none if it lacks one.
    shapes: Vec<Option<(usize, Vec<usize>)>>,
}

impl Fused {
    /// Rows of each part, if they are known: as in a model of these widths, or as all models of the family have them in
    /// proportion to the inputs.
    pub fn rows(&self, input: usize, output: usize) -> Option<Vec<usize>> {
        let known = |(i, rows): &&(usize, Vec<usize>)| *i == input && rows.iter().sum::<usize>() == output;
        let shapes = || self.shapes.iter().flatten();
        if let Some((_, rows)) = shapes().find(known) {
            return Some(rows.clone());
        }
        let (width, first) = shapes().next()?;
        if first.iter().all(|rows| *rows == first[0]) {
            let n = first.len();
            return output.is_multiple_of(n).then(|| vec![output / n; n]);
        }
        // As wide as the input, like queries; the others share what is left.
        let square = |rows: &usize| rows == width;
        let rest = output.checked_sub(input * first.iter().filter(|rows| square(rows)).count())?;
        let others: Vec<usize> = first.iter().filter(|rows| !square(rows)).copied().collect();
        let share =
            rest.checked_div(others.len()).filter(|share| *share > 0 && share * others.len() == rest)?;
        let alike = others.iter().all(|rows| *rows == others[0]);
        alike.then(|| first.iter().map(|rows| if square(rows) { input } else { share }).collect())
    }

    /// Inputs and outputs of the whole in a model.
    pub fn shape(&self, model: usize) -> Option<(usize, usize)> {
        let (input, rows) = self.shapes.get(model)?.as_ref()?;
        Some((*input, rows.iter().sum()))
    }

    /// Rows of a part that no layer adapts, by those that are.
    pub fn missing(&self, i: usize, input: usize, known: &[(usize, usize)]) -> Option<usize> {
        let fits = |(width, rows): &&(usize, Vec<usize>)| {
            *width == input && known.iter().all(|(i, n)| rows.get(*i) == Some(n))
        };
        let shapes = || self.shapes.iter().flatten();
        if let Some((_, rows)) = shapes().find(fits) {
            return rows.get(i).copied();
        }
        let (width, first) = shapes().next()?;
        let own = *first.get(i)?;
        let alike = known.iter().find(|(other, _)| first.get(*other) == Some(&own)).map(|(_, n)| *n);
        let in_proportion = || (own * input).is_multiple_of(*width).then(|| own * input / width);
        alike.or_else(in_proportion)
    }
}

/// A module's name, found in a record.
pub(in crate::adapter) struct Hit<'a> {
    pub row: &'static Row,
    pub name: &'static Name,
    /// What stands for `{}`.
    pub blocks: Vec<&'a str>,
    /// The models that have this block.
    pub models: Vec<usize>,
}

impl Record {
    fn parse(id: &'static str, text: &'static str) -> Self {
        let mut record = Self {
            id,
            name: id,
            words: Vec::new(),
            models: vec![id],
            kohya: Names::Native,
            kohya_takes: Vec::new(),
            bfl: false,
            xlabs: false,
            split: false,
            base: None,
            module: None,
            encoders: Vec::new(),
            stacks: Vec::new(),
            comfyui_takes: Vec::new(),
            diffusers_takes: Vec::new(),
            rows: Vec::new(),
            fused: Vec::new(),
            index: HashMap::new(),
        };
        let mut lines = text.lines().filter(|line| !line.starts_with('#'));
        for line in lines.by_ref().take_while(|line| !line.trim().is_empty()) {
            record.property(line);
        }
        for line in lines.filter(|line| !line.trim().is_empty()) {
            record.row(line);
        }
        record.fuse();
        for (i, row) in record.rows.iter().enumerate() {
            for (j, name) in row.names.iter().enumerate() {
                let places = record.index.entry(pattern(&flat(name.path)).0.into()).or_default();
                places.push((i as u16, j as u8));
            }
        }
        record
    }

    fn property(&mut self, line: &'static str) {
        let (key, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let value = value.trim();
        let words = || value.split_whitespace();
        match key {
            "name" => self.name = value,
            "words" => self.words = words().collect(),
            "models" => self.models = words().collect(),
            "kohya" => {
                self.kohya = whose(value.split_whitespace().next().unwrap_or_default());
                self.kohya_takes = words().map(whose).collect();
            }
            "bfl" => self.bfl = value == "yes",
            "xlabs" => self.xlabs = value == "yes",
            "split" => self.split = value == "yes",
            "kohya-base" => self.base = Some(value),
            "kohya-module" => self.module = Some(value),
            "encoder" => {
                let (component, names) = value.split_once('=').unwrap_or((value, ""));
                let mut names = names.split(',');
                let mut next = || names.next().unwrap_or_default();
                let (diffusers, comfyui, kohya) = (next(), next(), next());
                let kohya = kohya.split('/').filter(|prefix| !prefix.is_empty()).collect();
                self.encoders.push(Encoder { component, diffusers, comfyui, kohya });
            }
            "stacks" => self.stacks = words().filter_map(|pair| pair.split_once('=')).collect(),
            "comfyui-takes" => {
                self.comfyui_takes = words().filter_map(|text| Taken::parse(text, false)).collect()
            }
            "diffusers-takes" => {
                self.diffusers_takes = words().filter_map(|text| Taken::parse(text, true)).collect();
            }
            // The tests tell of a property that nobody reads.
            _ => debug_assert!(false, "{}: unknown property `{key}`", self.id),
        }
    }

    fn row(&mut self, line: &'static str) {
        let mut columns = line.split_whitespace();
        let mut next = || columns.next().unwrap_or("-");
        let (diffusers, native, blocks, marked, shapes) = (next(), next(), next(), next(), next());
        let others = next();
        let mut component = "";
        let mut names = Vec::new();
        let mut add = |of: Names, text: &'static str| {
            let (other, text) = text.split_once(':').unwrap_or(("", text));
            component = if other.is_empty() { component } else { other };
            if text != "-" {
                names.push(Name::parse(of, text));
            }
        };
        add(Names::Diffusers, diffusers);
        add(Names::Native, native);
        for other in others.split(',') {
            add(if other.contains(".processor.") { Names::Xlabs } else { Names::Other }, other);
        }
        let n = self.models.len();
        let each = |text: &'static str| -> Vec<&'static str> {
            let of: Vec<_> = text.split('|').collect();
            if of.len() == 1 { vec![of[0]; n] } else { of }
        };
        let blocks = each(blocks).into_iter().map(numbers).collect();
        let shapes = each(shapes).into_iter().map(shape).collect();
        self.rows.push(Row { component, names, shapes, blocks, marked: marked == "c" });
    }

    /// Gathers the parts of fused modules.
    fn fuse(&mut self) {
        let mut places: HashMap<&'static str, usize> = HashMap::new();
        let mut members: Vec<Vec<(usize, usize)>> = Vec::new();
        for (i, row) in self.rows.iter_mut().enumerate() {
            for name in &mut row.names {
                let Some((index, fused)) = &mut name.part else { continue };
                let place = *places.entry(name.path).or_insert_with(|| {
                    members.push(Vec::new());
                    members.len() - 1
                });
                *fused = place;
                members[place].push((*index, i));
            }
        }
        let mut paths: Vec<(&'static str, usize)> = places.into_iter().collect();
        paths.sort_by_key(|(_, place)| *place);
        for ((path, _), mut members) in paths.into_iter().zip(members) {
            members.sort_by_key(|(index, row)| (*index, *row));
            let mut parts: Vec<&'static str> = members.iter().map(|(_, i)| self.rows[*i].path()).collect();
            parts.dedup();
            let of = |model: usize| {
                let shape = |index: usize| {
                    let of = members.iter().filter(|(i, _)| *i == index);
                    of.filter_map(|(_, row)| self.rows[*row].shapes.get(model)?.as_ref()).next()
                };
                let shapes: Vec<&Shape> = (0..parts.len()).map(shape).collect::<Option<_>>()?;
                Some((shapes[0].columns(), shapes.iter().map(|s| s.output).collect()))
            };
            let shapes = (0..self.models.len()).map(of).collect();
            self.fused.push(Fused { path, parts, shapes });
        }
    }

    /// The modules of this flat name, in any spelling; those with this block first.
    pub fn find<'a>(&'static self, component: &str, key: &str, numbers: &[(u32, &'a str)]) -> Vec<Hit<'a>> {
        let places = self.index.get(key).into_iter().flatten();
        let mut hits: Vec<Hit<'a>> = places
            .filter_map(|&(row, name)| {
                let row: &'static Row = &self.rows[usize::from(row)];
                let name = &row.names[usize::from(name)];
                (row.component == component).then_some(())?;
                let fits = |(own, (n, _)): (&Option<u32>, &(u32, &str))| own.is_none_or(|own| own == *n);
                name.numbers.iter().zip(numbers).all(fits).then_some(())?;
                let free = || name.numbers.iter().zip(numbers).filter(|(own, _)| own.is_none());
                let values: Vec<u32> = free().map(|(_, (n, _))| *n).collect();
                let models = (0..row.shapes.len()).filter(|&m| row.has(m, &values)).collect();
                Some(Hit { row, name, blocks: free().map(|(_, (_, text))| *text).collect(), models })
            })
            .collect();
        hits.sort_by_key(|hit| hit.models.is_empty());
        hits
    }

    /// Whether it has modules of such names.
    pub fn has(&self, of: Names) -> bool {
        self.rows.iter().any(|row| row.names.iter().any(|name| name.of == of))
    }
}

impl Taken {
    /// `names:prefix:suffix:which`; the suffix only if there is one, and without the last of all modules.
    fn parse(text: &'static str, suffixed: bool) -> Option<Self> {
        let mut parts = text.split(':');
        let (names, prefix) = (whose(parts.next()?), parts.next()?);
        let suffix = if suffixed { Some(parts.next()?) } else { None };
        let which = match parts.next() {
            Some("blocks") => Which::Blocks,
            Some("blocks+c") => Which::MarkedBlocks,
            Some(_) => Which::Marked,
            None => Which::All,
        };
        Some(Self { names, prefix: if prefix == "-" { "" } else { prefix }, suffix, which })
    }
}

impl Row {
    /// The name by which layers are matched.
    pub fn path(&self) -> &'static str {
        self.names.first().map_or("", |name| name.path)
    }

    fn has(&self, model: usize, values: &[u32]) -> bool {
        let within = |(ranges, n): (&Vec<(u32, u32)>, &u32)| ranges.iter().any(|(a, b)| (a..=b).contains(&n));
        self.shapes.get(model).is_some_and(Option::is_some)
            && self.blocks.get(model).is_some_and(|of| of.iter().zip(values).all(within))
    }

    /// The kernel, if it is a convolution.
    pub fn kernel(&self) -> Option<&[usize]> {
        let shapes = self.shapes.iter().flatten();
        shapes.map(|shape| &shape.kernel[..]).find(|kernel| !kernel.is_empty())
    }

    /// How many blocks the first `{}` stands for in a model.
    pub fn count(&self, model: usize) -> usize {
        let has = self.shapes.get(model).is_some_and(Option::is_some);
        let ranges = self.blocks.get(model).filter(|_| has).and_then(|of| of.first());
        ranges.into_iter().flatten().map(|(_, last)| *last as usize + 1).max().unwrap_or(0)
    }

    /// How many modules of a model the row stands for.
    pub fn instances(&self, model: usize) -> usize {
        let of = |ranges: &Vec<(u32, u32)>| ranges.iter().map(|(a, b)| (b - a) as usize + 1).sum::<usize>();
        self.blocks.get(model).map_or(0, |blocks| blocks.iter().map(of).product())
    }

    /// Numbers of blocks that a model has, for each `{}`.
    #[cfg(test)]
    pub fn blocks(&self, model: usize) -> &[Vec<(u32, u32)>] {
        &self.blocks[model]
    }
}

impl Name {
    fn parse(of: Names, text: &'static str) -> Self {
        let (text, swap) = text.strip_suffix('~').map_or((text, false), |text| (text, true));
        let part = text.strip_suffix(']').and_then(|text| text.rsplit_once('['));
        let part = part.and_then(|(path, index)| Some((path, index.parse().ok()?)));
        let (path, part) = part.map_or((text, None), |(path, index)| (path, Some((index, 0))));
        let flat = flat(path);
        let numbers = flat.split('_').filter_map(|word| match ending(word) {
            Some((_, n, _)) => Some(Some(n)),
            None => word.ends_with("{}").then_some(None),
        });
        Self { of, path, part, swap, numbers: numbers.collect() }
    }
}

fn whose(text: &str) -> Names {
    match text {
        "diffusers" => Names::Diffusers,
        "other" => Names::Other,
        _ => Names::Native,
    }
}

/// `0-18`, `6,14`, `0-1/0-9`.
fn numbers(text: &str) -> Vec<Vec<(u32, u32)>> {
    let number = |text: &str| text.parse().unwrap_or(0);
    let range = |text: &str| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        (number(first), number(last))
    };
    match text {
        "-" | "." => Vec::new(),
        _ => text.split('/').map(|of| of.split(',').map(range).collect()).collect(),
    }
}

fn shape(text: &str) -> Option<Shape> {
    let (input, output) = text.split_once('>')?;
    let (output, kernel) = output.split_once('k').unwrap_or((output, ""));
    let kernel = kernel.split('x').filter_map(|n| n.parse().ok()).collect();
    Some(Shape { input: input.parse().ok()?, output: output.parse().ok()?, kernel })
}

/// A word that ends in a number, such as is written: what stands before it, the number and its text.
fn ending(word: &str) -> Option<(&str, u32, &str)> {
    let (head, digits) = word.split_at(word.trim_end_matches(|c: char| c.is_ascii_digit()).len());
    // `04` would not come back.
    let plain = !digits.is_empty() && digits.len() < 9 && (digits == "0" || !digits.starts_with('0'));
    plain.then(|| Some((head, digits.parse().ok()?, digits))).flatten()
}

/// A flat name with `#` for the number that a word ends in, and the numbers.
pub(in crate::adapter) fn pattern(flat: &str) -> (String, Vec<(u32, &str)>) {
    let mut pattern = String::with_capacity(flat.len());
    let mut numbers = Vec::new();
    for (i, word) in flat.split('_').enumerate() {
        if i > 0 {
            pattern.push('_');
        }
        match (ending(word), word.strip_suffix("{}")) {
            (Some((head, n, digits)), _) => {
                numbers.push((n, digits));
                pattern.push_str(head);
                pattern.push('#');
            }
            (None, Some(head)) => {
                pattern.push_str(head);
                pattern.push('#');
            }
            (None, None) => pattern.push_str(word),
        }
    }
    (pattern, numbers)
}

/// Fills the numbers of blocks in.
pub(in crate::adapter) fn fill(path: &str, blocks: &[&str]) -> String {
    let mut parts = path.split("{}");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.zip(blocks).fold(first, |path, (part, number)| path + number + part)
}

pub(in crate::adapter) fn flat(path: &str) -> String {
    path.replace('.', "_")
}

/// The record of text encoders, which is of no family.
const ENCODERS: &str = "text_encoders";

/// What is read under Miri, which takes some hundred times as long as the machine: with all families, a quarter of an hour
/// before it knows the first key. Reading names is the same work for every family. This one is short, and has blocks, fused
/// modules, halves that are swapped, and names of XLabs.
const UNDER_MIRI: &str = "flux1";

/// All records.
struct Records {
    families: Vec<Record>,
    encoders: Record,
    /// The families that have a name of this pattern, as bits.
    having: HashMap<Box<str>, u128>,
}

static RECORDS: LazyLock<Records> = LazyLock::new(|| {
    const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/families.rs"));
    let is_read = |id: &str| id != ENCODERS && (!cfg!(miri) || id == UNDER_MIRI);
    let families: Vec<_> = FILES.iter().filter(|(id, _)| is_read(id)).copied().collect();
    let encoders = FILES.iter().find(|(id, _)| *id == ENCODERS).map_or("", |(_, text)| text);
    let families = parsed(&families);
    let mut having: HashMap<Box<str>, u128> = HashMap::new();
    for (i, record) in families.iter().enumerate() {
        for key in record.index.keys() {
            *having.entry(key.clone()).or_default() |= 1 << i;
        }
    }
    Records { families, encoders: Record::parse(ENCODERS, encoders), having }
});

/// Parses the records of families on a few threads. They are threads of its own: one of rayon's would take up other work
/// while it waits, which may need the records.
fn parsed(files: &[(&'static str, &'static str)]) -> Vec<Record> {
    let parse = |files: &[(&'static str, &'static str)]| -> Vec<Record> {
        files.iter().map(|&(id, text)| Record::parse(id, text)).collect()
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    if threads == 1 || cfg!(target_arch = "wasm32") {
        return parse(files);
    }
    std::thread::scope(|scope| {
        let parts = files.chunks(files.len().div_ceil(threads));
        let running: Vec<_> = parts.map(|part| (part, scope.spawn(move || parse(part)))).collect();
        // A thread that ended early has left its part undone.
        running.into_iter().flat_map(|(part, thread)| thread.join().unwrap_or_else(|_| parse(part))).collect()
    })
}

/// The families.
pub(in crate::adapter) fn records() -> &'static [Record] {
    &RECORDS.families
}

/// Modules of text encoders.
pub(in crate::adapter) fn encoders() -> &'static Record {
    &RECORDS.encoders
}

/// The families that have a name of this pattern, as bits.
pub(in crate::adapter) fn having(pattern: &str) -> u128 {
    RECORDS.having.get(pattern).copied().unwrap_or(0)
}
