//! The kernels: how their WGSL is put together, and what is declared of each.
//!
//! A shader in `shaders/` begins with the constants of its permutation; in place of a line `#import shared/words` comes
//! `shaders/shared/words.wgsl`, once, with what that imports. What an import without a folder stands for (`#import real`)
//! the permutation says. Operations declare their kernels beside their launchers; [`declared`] lists them all.

use std::collections::HashMap;
use std::panic::Location;
use std::sync::LazyLock;

use super::{Element, batch, gpu, ops, self_test};
use crate::Dtype;

/// Every file of `shaders/`: its path without the extension, by which they are sorted, and its text.
const SHADERS: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/shaders.rs"));

/// A kernel: a file in `shaders/`, and what makes it one of its permutations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kernel {
    file: &'static str,
    constants: List<(&'static str, Constant)>,
    /// What imports without a folder stand for.
    imports: List<(&'static str, &'static str)>,
    /// The binding whose offset is said when a launch is recorded.
    moving: Option<u32>,
}

/// A list of so many at most; the first that is missing ends it.
type List<T> = [Option<T>; 5];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Constant {
    U32(u32),
    Bool(bool),
    /// Another u32 constant of the shader.
    Named(&'static str),
}

fn add<T>(mut list: List<T>, item: T) -> List<T> {
    let place = list.iter_mut().find(|place| place.is_none());
    *place.expect("a list is long enough for every kernel: a test makes them all") = Some(item);
    list
}

/// The files of `shaders/` that are kernels, rather than pieces that kernels import.
pub fn files() -> impl Iterator<Item = &'static str> {
    SHADERS.iter().map(|(file, _)| *file).filter(|file| !file.split('/').any(|folder| folder == "shared"))
}

impl Kernel {
    /// `shaders/{file}.wgsl`.
    pub(crate) fn new(file: &'static str) -> Self {
        Self { file, constants: [None; 5], imports: [None; 5], moving: None }
    }

    fn with(self, name: &'static str, value: Constant) -> Self {
        Self { constants: add(self.constants, (name, value)), ..self }
    }

    /// This one with a number.
    pub(crate) fn number(self, name: &'static str, value: u32) -> Self {
        self.with(name, Constant::U32(value))
    }

    /// This one with a truth.
    pub(crate) fn flag(self, name: &'static str, value: bool) -> Self {
        self.with(name, Constant::Bool(value))
    }

    /// This one with another constant's number.
    pub(crate) fn named(self, name: &'static str, value: &'static str) -> Self {
        self.with(name, Constant::Named(value))
    }

    /// This one for values of a type, as shaders/shared/words.wgsl names it.
    pub(crate) fn dtype(self, dtype: Dtype) -> Self {
        self.named(
            "DTYPE",
            match dtype {
                Dtype::F32 => "F32",
                Dtype::F16 => "F16",
                Dtype::Bf16 => "BF16",
            },
        )
    }

    /// This one with a file in place of an import.
    pub(crate) fn import(self, name: &'static str, file: &'static str) -> Self {
        Self { imports: add(self.imports, (name, file)), ..self }
    }

    /// This one with a binding whose offset is said each time that a launch is recorded.
    pub(crate) fn moving(self, binding: u32) -> Self {
        Self { moving: Some(binding), ..self }
    }

    /// That binding.
    pub(crate) fn moves(&self) -> Option<u32> {
        self.moving
    }

    /// The bindings of storage buffers, and whether they are only read.
    pub(crate) fn storage(&self) -> Vec<(u32, bool)> {
        let source = self.source();
        let binding = |line: &str| {
            let (number, rest) = line.strip_prefix("@group(0) @binding(")?.split_once(") var<storage, ")?;
            Some((number.parse().ok()?, rest.starts_with("read>")))
        };
        source.lines().filter_map(binding).collect()
    }

    /// This one with the arithmetic of an element type in place of `#import real`.
    pub(crate) fn real(self, element: Element) -> Self {
        self.import(
            "real",
            match element {
                Element::F64 => "shared/real_f64",
                Element::DoubleSingle => "shared/real_double_single",
                // No kernel sums on the host.
                Element::F32 | Element::Host => "shared/real_f32",
            },
        )
    }

    /// The path in `shaders/`, without the extension.
    pub fn file(&self) -> &'static str {
        self.file
    }

    /// The constants that make it this permutation.
    pub fn permutation(&self) -> impl Iterator<Item = &'static str> {
        self.constants.iter().flatten().map(|(name, _)| *name)
    }

    /// The file, and what makes it this permutation.
    pub fn label(&self) -> String {
        let constants = self.constants.iter().flatten().map(|(name, value)| match value {
            Constant::U32(value) => format!(" {name}={value}"),
            Constant::Bool(value) => format!(" {name}={value}"),
            Constant::Named(value) => format!(" {name}={value}"),
        });
        let imports = self.imports.iter().flatten().map(|(_, file)| {
            let (_, name) = file.rsplit_once('/').unwrap_or(("", file));
            format!(" {name}")
        });
        std::iter::once(self.file.to_owned()).chain(constants).chain(imports).collect()
    }

    /// The permutation's whole WGSL.
    pub fn source(&self) -> String {
        let mut body = String::new();
        for (name, value) in self.constants.iter().flatten() {
            body += &match value {
                Constant::U32(value) => format!("const {name}: u32 = {value}u;\n"),
                Constant::Bool(value) => format!("const {name}: bool = {value};\n"),
                Constant::Named(value) => format!("const {name}: u32 = {value};\n"),
            };
        }
        let mut seen = vec![self.file];
        let mut enabled = String::new();
        self.append(self.file, &mut seen, &mut enabled, &mut body);
        // Directives come before all else.
        enabled + &body
    }

    fn append(&self, file: &str, seen: &mut Vec<&'static str>, enabled: &mut String, body: &mut String) {
        for line in wgsl(file).lines() {
            if line.starts_with("enable ") {
                enabled.push_str(line);
                enabled.push('\n');
            } else if let Some(import) = line.strip_prefix("#import ") {
                let (name, _) = self.resolved(import);
                if !seen.contains(&name) {
                    seen.push(name);
                    self.append(name, seen, enabled, body);
                }
            } else {
                body.push_str(line);
                body.push('\n');
            }
        }
    }

    fn resolved(&self, import: &str) -> (&'static str, &'static str) {
        let chosen = self.imports.iter().flatten().find(|(name, _)| *name == import);
        found(chosen.map_or(import, |(_, file)| file))
    }
}

fn wgsl(file: &str) -> &'static str {
    found(file).1
}

/// A file's name and text.
fn found(file: &str) -> (&'static str, &'static str) {
    let place = SHADERS.binary_search_by_key(&file, |(name, _)| *name);
    place.map(|place| SHADERS[place]).unwrap_or_else(|_| {
        panic!("no file of shaders/ is `{file}`: the portability test puts together all that are imported")
    })
}

/// What an operation declares of a kernel, in all of its permutations.
#[derive(Debug)]
pub struct Declared {
    /// The permutations.
    pub kernels: Vec<Kernel>,
    /// Buffers that hold structs, or arrays of them, by name: its jobs first.
    pub structs: Vec<(&'static str, Struct)>,
    /// Constants of the shader that its launcher relies on.
    pub constants: Vec<(&'static str, f64)>,
    /// The file that declares it.
    pub launcher: &'static str,
}

/// A struct as a launcher lays it out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Struct {
    /// The fields, each with its first byte.
    pub fields: Vec<(&'static str, usize)>,
    /// The bytes of all.
    pub bytes: usize,
}

impl Struct {
    fn of<T: Layout>() -> Self {
        Self { fields: T::fields("", 0), bytes: size_of::<T>() }
    }
}

impl Declared {
    #[track_caller]
    pub(crate) fn new<J: Layout>(kernels: impl IntoIterator<Item = Kernel>) -> Self {
        Self {
            kernels: kernels.into_iter().collect(),
            structs: vec![("jobs", Struct::of::<J>())],
            constants: Vec::new(),
            launcher: Location::caller().file(),
        }
    }

    pub(crate) fn with_struct<T: Layout>(mut self, buffer: &'static str) -> Self {
        self.structs.push((buffer, Struct::of::<T>()));
        self
    }

    pub(crate) fn constant(mut self, name: &'static str, value: impl TryInto<u32>) -> Self {
        let value = value.try_into().ok().expect("WGSL's constants are 32 bits long");
        self.constants.push((name, value.into()));
        self
    }

    pub(crate) fn float(mut self, name: &'static str, value: impl Into<f64>) -> Self {
        self.constants.push((name, value.into()));
        self
    }

    /// The constants of shaders/shared/words.wgsl, for jobs that name a type.
    pub(crate) fn dtypes(self) -> Self {
        let code = ops::dtype_code;
        self.constant("F32", code(Dtype::F32))
            .constant("F16", code(Dtype::F16))
            .constant("BF16", code(Dtype::Bf16))
    }
}

/// Every kernel.
pub fn declared() -> Vec<Declared> {
    let mut all = ops::declared();
    all.push(batch::declared());
    all.push(self_test::declared());
    all
}

/// The parameters that every kernel with a table of work reads.
pub fn params() -> Struct {
    Struct::of::<gpu::Params>()
}

/// Whether a kernel is declared, with jobs of this type, so that the test compares what is launched.
pub(crate) fn is_declared<J: Layout>(kernel: Kernel) -> bool {
    static JOBS: LazyLock<HashMap<Kernel, Struct>> = LazyLock::new(|| {
        let jobs = |Declared { kernels, structs, .. }: Declared| {
            let (_, jobs) = structs[0].clone();
            kernels.into_iter().map(move |kernel| (kernel, jobs.clone()))
        };
        declared().into_iter().flat_map(jobs).collect()
    });
    JOBS.get(&kernel) == Some(&Struct::of::<J>())
}

/// Where the fields of a type lie that shaders read.
pub(crate) trait Layout {
    /// The fields of a value called `name`, `at` bytes from the start.
    fn fields(name: &'static str, at: usize) -> Vec<(&'static str, usize)> {
        vec![(name, at)]
    }
}

impl Layout for u32 {}
impl Layout for f32 {}
impl<T, const N: usize> Layout for [T; N] {}

/// Declares a struct that a shader declares as well, field by field: of a field that is such a struct itself the shader has
/// its fields in place. A test compares the two.
macro_rules! job {
    ($(#[$attribute:meta])* $visible:vis struct $name:ident {
        $($(#[$field_attribute:meta])* $field_visible:vis $field:ident: $type:ty,)*
    }) => {
        $(#[$attribute])*
        #[derive(Clone, Copy, Debug, bytemuck::NoUninit)]
        #[repr(C)]
        $visible struct $name {
            $($(#[$field_attribute])* $field_visible $field: $type,)*
        }

        impl $crate::compute::shaders::Layout for $name {
            fn fields(_: &'static str, at: usize) -> Vec<(&'static str, usize)> {
                use $crate::compute::shaders::Layout;
                let fields = [
                    $(<$type as Layout>::fields(stringify!($field), at + std::mem::offset_of!($name, $field)),)*
                ];
                fields.concat()
            }
        }
    };
}
pub(crate) use job;

/// The columns of a tile, and how threads share it: 8 columns each halve the reads of workgroup memory, but need a wide
/// tile.
pub(crate) fn shared_tile(kernel: Kernel, columns: u32) -> Kernel {
    let of_a_thread = if columns == 128 { 8 } else { 4 };
    kernel.number("COLUMNS", of_a_thread).number("THREADS_N", columns / of_a_thread)
}
