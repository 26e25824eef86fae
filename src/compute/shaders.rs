//! The kernels: their WGSL, and every permutation that is ever compiled.
//!
//! A shader in `shaders/` is put together from the constants of its permutation and the pieces in
//! `shaders/shared/` that it `#import`s. `#import real` takes the arithmetic of the permutation's tier.

use super::Element;
use super::ops::Score;
use crate::Dtype;

/// A kernel, with the parameters that make it a permutation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kernel {
    /// `shaders/rank_concat.wgsl`
    RankConcat,
    /// `shaders/copy.wgsl`
    Copy,
    /// `shaders/project.wgsl`, with the columns (rank) of its tile, 32, 64 or 128, and the type of X.
    Project(u32, Dtype),
    /// `shaders/rows.wgsl`
    Rows,
    /// `shaders/row_scale.wgsl`
    RowScale,
    /// `shaders/split_rows.wgsl`
    SplitRows,
    /// `shaders/project_matrix.wgsl`, with the columns (rank) of its tile, 32 or 64, and the type of X.
    ProjectMatrix(u32, Dtype),
    /// `shaders/sum_parts.wgsl`
    SumParts,
    /// `shaders/project_real.wgsl`
    ProjectReal(Element),
    /// `shaders/gram.wgsl`, with the side of its tile: 32, 64 or 128.
    Gram(u32),
    /// `shaders/gram_matrix.wgsl`
    GramMatrix,
    /// `shaders/gram_real.wgsl`: what Z holds, what is summed.
    GramReal(Element, Element),
    /// `shaders/gram_reduce.wgsl`: what the parts hold, what is summed.
    GramReduce(Element, Element),
    /// `shaders/cholesky.wgsl`
    Cholesky(Element),
    /// `shaders/cholesky_solve.wgsl`
    CholeskySolve(Element),
    /// `shaders/matmul.wgsl`
    Matmul(Element),
    /// `shaders/jacobi_svd.wgsl`
    JacobiSvd(Element),
    /// `shaders/rank_update.wgsl`
    RankUpdate(Element),
    /// `shaders/branch_scores.wgsl`: which score, the type of the features.
    BranchScores(Score, Dtype),
    /// `shaders/branch_scores_matrix.wgsl`: the same, and its tile.
    BranchScoresMatrix(Score, Dtype, BranchTile),
    /// `shaders/branch_split_b.wgsl`
    BranchSplitB,
    /// `shaders/branch_finish.wgsl`
    BranchFinish,
    /// `shaders/branch_means.wgsl`
    BranchMeans,
    /// `shaders/branch_choose.wgsl`
    BranchChoose,
    /// `shaders/branch_apply.wgsl`, with the type of the features.
    BranchApply(Dtype),
    /// `shaders/branch_apply_matrix.wgsl`, with the type of the features and its tile.
    BranchApplyMatrix(Dtype, BranchTile),
    /// `shaders/blend.wgsl`
    Blend,
    /// `shaders/extrapolate.wgsl`, with the type of its operands.
    Extrapolate(Dtype),
    /// `shaders/cosine.wgsl`
    Cosine,
    /// `shaders/gradient_norm.wgsl`
    GradientNorm,
    /// `shaders/gradient_step.wgsl`
    GradientStep,
    /// `shaders/entries.wgsl`
    Entries(Element),
    /// `shaders/magnitudes.wgsl`
    Magnitudes(Element),
    /// `shaders/self_test.wgsl`
    SelfTest,
}

/// The tile of `shaders/shared/branch_tile_matrix.wgsl`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BranchTile {
    /// Most columns of a product: 32, 64 or 128.
    pub depth: u32,
    /// Whether B has low parts.
    pub low: bool,
    /// Without matrix units, to test what is around them.
    pub software: bool,
}

impl BranchTile {
    /// Of every depth.
    pub const DEPTHS: [u32; 3] = [32, 64, 128];

    fn all() -> impl Iterator<Item = Self> {
        let of = |depth| [(false, false), (true, false), (false, true), (true, true)].map(|of| (depth, of));
        let tiles = Self::DEPTHS.into_iter().flat_map(of);
        tiles.map(|(depth, (low, software))| Self { depth, low, software }).filter(|tile| tile.room() > 0)
    }

    /// Subgroups whose tiles fit the workgroup memory.
    pub(crate) fn room(self) -> u32 {
        // More than 48 KB lets NVIDIA's driver hang; software adapters have 32.
        let memory: u32 = if self.software { 32 << 10 } else { 48 << 10 };
        let row = 2 * (self.depth + 8);
        let b = 64 * row * (1 + u32::from(self.low));
        memory.saturating_sub(b) / (16 * (2 * row + 4 * 72))
    }

    /// Subgroups of a workgroup, `most` if their tiles fit; each has 16 tokens.
    pub(crate) fn subgroups(self, most: u32) -> u32 {
        1 << self.room().clamp(1, most).ilog2()
    }

    fn constants(self, most: u32) -> String {
        let (Self { depth, low, .. }, subgroups) = (self, self.subgroups(most));
        format!(
            "const DEPTH: u32 = {depth}u;\nconst LOW: bool = {low};\nconst SUBGROUPS: u32 = {subgroups}u;\n"
        )
    }

    fn label(self) -> String {
        let [low, software] =
            [(self.low, "_low"), (self.software, "_software")].map(|(is, name)| if is { name } else { "" });
        format!("{}{low}{software}", self.depth)
    }
}

/// Most subgroups of a workgroup: scores take many registers.
pub(crate) const SCORES_SUBGROUPS: u32 = 2;
pub(crate) const APPLY_SUBGROUPS: u32 = 4;

macro_rules! shared {
    ($name:literal) => {
        include_str!(concat!("../../shaders/shared/", $name, ".wgsl"))
    };
}
macro_rules! kernel {
    ($name:literal) => {
        include_str!(concat!("../../shaders/", $name, ".wgsl"))
    };
}

const TILES: [u32; 3] = [32, 64, 128];
const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];
const WIDE: [Element; 2] = [Element::F64, Element::DoubleSingle];

impl Kernel {
    /// Every permutation.
    pub fn all() -> Vec<Self> {
        let mut all = vec![
            Self::Copy,
            Self::RankConcat,
            Self::Rows,
            Self::RowScale,
            Self::SplitRows,
            Self::SumParts,
            Self::GramMatrix,
            Self::SelfTest,
            Self::Matmul(Element::F32),
            Self::BranchSplitB,
            Self::BranchFinish,
            Self::BranchMeans,
            Self::BranchChoose,
            Self::Blend,
            Self::Cosine,
            Self::GradientNorm,
            Self::GradientStep,
            Self::RankUpdate(Element::F32),
            Self::Entries(Element::F32),
            Self::Magnitudes(Element::F32),
        ];
        for dtype in DTYPES {
            all.extend(Score::ALL.map(|score| Self::BranchScores(score, dtype)));
            all.push(Self::BranchApply(dtype));
            for tile in BranchTile::all() {
                all.extend(Score::ALL.map(|score| Self::BranchScoresMatrix(score, dtype, tile)));
                all.push(Self::BranchApplyMatrix(dtype, tile));
            }
            all.push(Self::Extrapolate(dtype));
            all.extend(TILES.map(|tile| Self::Project(tile, dtype)));
            all.extend([32, 64].map(|tile| Self::ProjectMatrix(tile, dtype)));
        }
        all.extend(TILES.map(Self::Gram));
        all.extend(WIDE.iter().flat_map(|&wide| {
            [
                Self::ProjectReal(wide),
                Self::GramReal(wide, wide),
                Self::GramReal(Element::F32, wide),
                Self::GramReduce(wide, wide),
                Self::GramReduce(Element::F32, wide),
                Self::Cholesky(wide),
                Self::CholeskySolve(wide),
                Self::Matmul(wide),
                Self::JacobiSvd(wide),
                Self::RankUpdate(wide),
                Self::Entries(wide),
                Self::Magnitudes(wide),
            ]
        }));
        all
    }

    /// The file in `shaders/`, and the values of the permutation.
    pub fn label(self) -> String {
        let (file, _) = self.file();
        let element = |e| match e {
            Element::F32 => "f32",
            Element::F64 => "f64",
            Element::DoubleSingle => "double_single",
            Element::Host => "host",
        };
        match self {
            Self::RankConcat
            | Self::Copy
            | Self::Rows
            | Self::RowScale
            | Self::SplitRows
            | Self::SumParts
            | Self::GramMatrix
            | Self::SelfTest
            | Self::BranchSplitB
            | Self::BranchFinish
            | Self::BranchMeans
            | Self::BranchChoose
            | Self::Blend
            | Self::Cosine
            | Self::GradientNorm
            | Self::GradientStep => file.to_owned(),
            Self::Project(tile, dtype) | Self::ProjectMatrix(tile, dtype) => format!("{file}_{tile}_{dtype}"),
            Self::BranchScores(score, dtype) => format!("{file}_{}_{dtype}", score.name()),
            Self::BranchScoresMatrix(score, dtype, tile) => {
                format!("{file}_{}_{dtype}_{}", score.name(), tile.label())
            }
            Self::BranchApplyMatrix(dtype, tile) => format!("{file}_{dtype}_{}", tile.label()),
            Self::BranchApply(dtype) | Self::Extrapolate(dtype) => format!("{file}_{dtype}"),
            Self::Gram(tile) => format!("{file}_{tile}"),
            Self::ProjectReal(e)
            | Self::Cholesky(e)
            | Self::CholeskySolve(e)
            | Self::Matmul(e)
            | Self::JacobiSvd(e)
            | Self::RankUpdate(e)
            | Self::Entries(e)
            | Self::Magnitudes(e) => format!("{file}_{}", element(e)),
            Self::GramReal(part, e) | Self::GramReduce(part, e) => {
                format!("{file}_{}_to_{}", element(part), element(e))
            }
        }
    }

    fn file(self) -> (&'static str, &'static str) {
        match self {
            Self::Copy => ("copy", kernel!("copy")),
            Self::RankConcat => ("rank_concat", kernel!("rank_concat")),
            Self::Rows => ("rows", kernel!("rows")),
            Self::Project(..) => ("project", kernel!("project")),
            Self::SumParts => ("sum_parts", kernel!("sum_parts")),
            Self::RowScale => ("row_scale", kernel!("row_scale")),
            Self::SplitRows => ("split_rows", kernel!("split_rows")),
            Self::ProjectMatrix(..) => ("project_matrix", kernel!("project_matrix")),
            Self::ProjectReal(_) => ("project_real", kernel!("project_real")),
            Self::Gram(_) => ("gram", kernel!("gram")),
            Self::GramMatrix => ("gram_matrix", kernel!("gram_matrix")),
            Self::GramReal(..) => ("gram_real", kernel!("gram_real")),
            Self::GramReduce(..) => ("gram_reduce", kernel!("gram_reduce")),
            Self::Cholesky(_) => ("cholesky", kernel!("cholesky")),
            Self::CholeskySolve(_) => ("cholesky_solve", kernel!("cholesky_solve")),
            Self::Matmul(_) => ("matmul", kernel!("matmul")),
            Self::JacobiSvd(_) => ("jacobi_svd", kernel!("jacobi_svd")),
            Self::RankUpdate(_) => ("rank_update", kernel!("rank_update")),
            Self::BranchScores(..) => ("branch_scores", kernel!("branch_scores")),
            Self::BranchScoresMatrix(..) => ("branch_scores_matrix", kernel!("branch_scores_matrix")),
            Self::BranchSplitB => ("branch_split_b", kernel!("branch_split_b")),
            Self::BranchFinish => ("branch_finish", kernel!("branch_finish")),
            Self::BranchMeans => ("branch_means", kernel!("branch_means")),
            Self::BranchChoose => ("branch_choose", kernel!("branch_choose")),
            Self::BranchApply(_) => ("branch_apply", kernel!("branch_apply")),
            Self::BranchApplyMatrix(..) => ("branch_apply_matrix", kernel!("branch_apply_matrix")),
            Self::Blend => ("blend", kernel!("blend")),
            Self::Extrapolate(_) => ("extrapolate", kernel!("extrapolate")),
            Self::Cosine => ("cosine", kernel!("cosine")),
            Self::GradientNorm => ("gradient_norm", kernel!("gradient_norm")),
            Self::GradientStep => ("gradient_step", kernel!("gradient_step")),
            Self::Entries(_) => ("entries", kernel!("entries")),
            Self::Magnitudes(_) => ("magnitudes", kernel!("magnitudes")),
            Self::SelfTest => ("self_test", kernel!("self_test")),
        }
    }

    /// What `#import real` stands for.
    fn real(self) -> Option<Element> {
        match self {
            Self::RankConcat
            | Self::Copy
            | Self::Rows
            | Self::RowScale
            | Self::SplitRows
            | Self::SumParts
            | Self::Project(..)
            | Self::ProjectMatrix(..)
            | Self::Gram(_)
            | Self::GramMatrix
            | Self::BranchScores(..)
            | Self::BranchScoresMatrix(..)
            | Self::BranchSplitB
            | Self::BranchFinish
            | Self::BranchMeans
            | Self::BranchChoose
            | Self::BranchApply(_)
            | Self::BranchApplyMatrix(..)
            | Self::Blend
            | Self::Extrapolate(_)
            | Self::Cosine
            | Self::GradientNorm
            | Self::GradientStep => None,
            Self::ProjectReal(e)
            | Self::Cholesky(e)
            | Self::CholeskySolve(e)
            | Self::Matmul(e)
            | Self::JacobiSvd(e)
            | Self::RankUpdate(e)
            | Self::Entries(e)
            | Self::Magnitudes(e) => Some(e),
            Self::GramReal(_, e) | Self::GramReduce(_, e) => Some(e),
            Self::SelfTest => Some(Element::DoubleSingle),
        }
    }

    /// The constants that the permutation sets.
    fn constants(self) -> String {
        match self {
            Self::Project(tile, dtype) => {
                let dtype = dtype_constant(dtype);
                format!(
                    "{dtype}const TILE_M: u32 = 128u;\nconst TILE_N: u32 = {tile}u;\n{}",
                    tile_constants(tile)
                )
            }
            Self::ProjectMatrix(tile, dtype) => {
                format!("{}const TILE_N: u32 = {tile}u;\n", dtype_constant(dtype))
            }
            Self::BranchApply(dtype) | Self::Extrapolate(dtype) => dtype_constant(dtype),
            Self::BranchApplyMatrix(dtype, tile) => dtype_constant(dtype) + &tile.constants(APPLY_SUBGROUPS),
            Self::BranchScores(score, dtype) => dtype_constant(dtype) + &score_constant(score),
            Self::BranchScoresMatrix(score, dtype, tile) => {
                dtype_constant(dtype) + &score_constant(score) + &tile.constants(SCORES_SUBGROUPS)
            }
            Self::Gram(tile) => format!("const TILE: u32 = {tile}u;\n{}", tile_constants(tile)),
            Self::GramReal(part, _) | Self::GramReduce(part, _) => match part {
                Element::F32 => {
                    "alias Part = f32;\nfn part_value(part: Part) -> Real { return real(part); }\n".to_owned()
                }
                _ => "alias Part = Real;\nfn part_value(part: Part) -> Real { return part; }\n".to_owned(),
            },
            _ => String::new(),
        }
    }

    /// Whether this needs matrix units or only serves them, which neither DX12 nor WebGPU's default limits have; each such kernel
    /// has a twin that does without.
    pub fn uses_matrix_units(self) -> bool {
        matches!(
            self,
            Self::ProjectMatrix(..)
                | Self::SplitRows
                | Self::GramMatrix
                | Self::BranchScoresMatrix(..)
                | Self::BranchSplitB
                | Self::BranchApplyMatrix(..)
        )
    }

    /// The permutation's whole WGSL.
    pub fn source(self) -> String {
        let (_, body) = self.file();
        let mut source = String::new();
        if self.uses_matrix_units() {
            source.push_str("enable f16;\n");
        }
        if self.uses_matrix_units() && !self.is_software() {
            source.push_str("enable wgpu_cooperative_matrix;\n");
        }
        source.push_str(&self.constants());
        for line in body.lines() {
            match line.strip_prefix("#import ") {
                None => source.push_str(line),
                Some(name) => source.push_str(self.import(name)),
            }
            source.push('\n');
        }
        source
    }

    /// Whether it stands in for matrix units.
    fn is_software(self) -> bool {
        match self {
            Self::BranchScoresMatrix(_, _, tile) | Self::BranchApplyMatrix(_, tile) => tile.software,
            // Of use without them.
            Self::BranchSplitB => true,
            _ => false,
        }
    }

    fn import(self, name: &str) -> &'static str {
        match (name, self.real()) {
            ("params", _) => shared!("params"),
            ("words", _) => shared!("words"),
            ("fetch", _) => shared!("fetch"),
            ("tile_f32", _) => shared!("tile_f32"),
            ("pack", _) => shared!("pack"),
            ("exponents", _) => shared!("exponents"),
            ("exp_log", _) => shared!("exp_log"),
            ("branch", _) => shared!("branch"),
            ("branch_state", _) => shared!("branch_state"),
            ("branch_finish", _) => shared!("branch_finish"),
            ("branch_split", _) => shared!("branch_split"),
            ("branch_features", _) => shared!("branch_features"),
            ("branch_tile_matrix", _) => shared!("branch_tile_matrix"),
            ("multiply", _) if self.is_software() => shared!("multiply_software"),
            ("multiply", _) => shared!("multiply_units"),
            ("features", _) => match self {
                Self::BranchScoresMatrix(_, Dtype::F32, _) | Self::BranchApplyMatrix(Dtype::F32, _) => {
                    shared!("features_f32")
                }
                _ => shared!("features_halves"),
            },
            ("branch_tile", _) => shared!("branch_tile"),
            ("strip", _) => shared!("strip"),
            ("entry", _) => shared!("entry"),
            ("real", Some(Element::F32)) => shared!("real_f32"),
            ("real", Some(Element::F64)) => shared!("real_f64"),
            ("real", Some(Element::DoubleSingle)) => shared!("real_double_single"),
            _ => unreachable!("no shader imports `{name}`: the portability test composes them all"),
        }
    }
}

/// How threads share a tile: 8 columns each halve the reads of workgroup memory, but need a wide tile.
fn tile_constants(tile: u32) -> String {
    let columns = if tile == 128 { 8 } else { 4 };
    format!("const COLUMNS: u32 = {columns}u;\nconst THREADS_N: u32 = {}u;\n", tile / columns)
}

fn score_constant(score: Score) -> String {
    format!("const SCORE: u32 = {}u;\n", score.code())
}

/// The type of X, as shaders/shared/words.wgsl names it.
fn dtype_constant(dtype: Dtype) -> String {
    format!("const DTYPE: u32 = {};\n", dtype.name().to_uppercase())
}
