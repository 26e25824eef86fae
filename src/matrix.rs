//! Plain data that crosses module borders: element types and host matrices.

use crate::{Error, Result};

/// Element type of a tensor in a file or of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The narrowest type that holds the values of both: f32 for f16 and bf16, of which neither holds the other's.
    pub fn common(self, other: Self) -> Self {
        if self == other { self } else { Self::F32 }
    }

    /// The name used on the command line: `f32`, `f16`, `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A borrowed row-major matrix of any [`Dtype`], as little-endian bytes with no alignment promised.
#[derive(Clone, Copy, Debug)]
pub struct RawMatrix<'a> {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    /// `rows · cols · dtype.size()` of them: kernels that check no bounds rely on it.
    bytes: &'a [u8],
}

impl<'a> RawMatrix<'a> {
    /// Checks that `bytes` has the length that the shape asks for.
    pub fn new(dtype: Dtype, rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self> {
        let want = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
        if want != Some(bytes.len()) {
            return Err(Error::Invalid(format!(
                "a {rows} x {cols} matrix of {dtype} takes {} bytes, but {} were given",
                want.map_or("too many".to_owned(), |n| n.to_string()),
                bytes.len()
            )));
        }
        Ok(Self { dtype, rows, cols, bytes })
    }

    /// A view of f32 values.
    pub fn from_f32(rows: usize, cols: usize, values: &'a [f32]) -> Result<Self> {
        Self::new(Dtype::F32, rows, cols, bytemuck::cast_slice(values))
    }

    /// The part of `bytes` that a shape asks for, or, if they do not hold it, a matrix of no rows.
    pub(crate) fn within(dtype: Dtype, rows: usize, cols: usize, bytes: &'a [u8]) -> Self {
        let len = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
        match len.and_then(|len| bytes.get(..len)) {
            Some(bytes) => Self { dtype, rows, cols, bytes },
            None => Self { dtype, rows: 0, cols, bytes: &[] },
        }
    }

    /// Element type.
    pub const fn dtype(self) -> Dtype {
        self.dtype
    }

    /// Rows.
    pub const fn rows(self) -> usize {
        self.rows
    }

    /// Columns; consecutive elements of a row are adjacent.
    pub const fn cols(self) -> usize {
        self.cols
    }

    /// `rows · cols · dtype.size()` bytes.
    pub const fn bytes(self) -> &'a [u8] {
        self.bytes
    }

    /// Rows `start..end` of the same matrix.
    pub fn row_range(self, start: usize, end: usize) -> Self {
        let width = self.cols * self.dtype.size();
        Self { rows: end - start, bytes: &self.bytes[start * width..end * width], ..self }
    }

    /// Columns `start..end` of a matrix of one row.
    pub(crate) fn columns(self, start: usize, end: usize) -> Self {
        let size = self.dtype.size();
        Self { cols: end - start, bytes: &self.bytes[start * size..end * size], ..self }
    }

    /// Writes the elements, widened exactly, to `out` (`rows · cols` long).
    pub fn widen_into<T: From<f32>>(self, out: &mut [T]) {
        fn each<T, const N: usize>(bytes: &[u8], out: &mut [T], widen: impl Fn([u8; N]) -> T) {
            let (values, _) = bytes.as_chunks::<N>();
            out.iter_mut().zip(values).for_each(|(o, b)| *o = widen(*b));
        }
        match self.dtype {
            Dtype::F32 => each(self.bytes, out, |b| f32::from_le_bytes(b).into()),
            Dtype::F16 => each(self.bytes, out, |b| from_f16(b).into()),
            Dtype::Bf16 => each(self.bytes, out, |b| from_bf16(b).into()),
        }
    }

    /// Appends the elements, widened exactly.
    pub(crate) fn append_to<T: From<f32>>(self, out: &mut Vec<T>) {
        fn all<T, const N: usize>(bytes: &[u8], out: &mut Vec<T>, widen: impl Fn([u8; N]) -> T) {
            let (values, _) = bytes.as_chunks::<N>();
            out.extend(values.iter().map(|b| widen(*b)));
        }
        match self.dtype {
            Dtype::F32 => all(self.bytes, out, |b| f32::from_le_bytes(b).into()),
            Dtype::F16 => all(self.bytes, out, |b| from_f16(b).into()),
            Dtype::Bf16 => all(self.bytes, out, |b| from_bf16(b).into()),
        }
    }

    /// The elements, widened exactly.
    pub fn to_vec<T: From<f32>>(self) -> Vec<T> {
        let mut out = Vec::with_capacity(self.rows * self.cols);
        self.append_to(&mut out);
        out
    }

    /// Index of the first element that is NaN or infinite.
    pub fn first_non_finite(self) -> Option<usize> {
        // A half or single is non-finite exactly when its exponent bits are all ones.
        match self.dtype {
            Dtype::F32 => first_with(self.bytes, 0x7f80_0000, u32::from_le_bytes),
            Dtype::F16 => first_with(self.bytes, 0x7c00, u16::from_le_bytes),
            Dtype::Bf16 => first_with(self.bytes, 0x7f80, u16::from_le_bytes),
        }
    }
}

fn from_f16(bytes: [u8; 2]) -> f32 {
    half::f16::from_le_bytes(bytes).to_f32()
}

/// The upper half of an f32.
fn from_bf16([low, high]: [u8; 2]) -> f32 {
    f32::from_le_bytes([0, 0, low, high])
}

/// Index of the first value that has all bits of `mask`.
fn first_with<T, const N: usize>(bytes: &[u8], mask: T, read: impl Fn([u8; N]) -> T) -> Option<usize>
where
    T: Copy + Eq + std::ops::BitAnd<Output = T>,
{
    const BLOCK: usize = 1 << 12;
    let (values, _) = bytes.as_chunks::<N>();
    let is_bad = |v: &[u8; N]| read(*v) & mask == mask;
    // Without an early way out, a block is compared many values at a time.
    let block = values.chunks(BLOCK).position(|block| block.iter().fold(false, |bad, v| bad | is_bad(v)))?;
    let first = block * BLOCK;
    values[first..].iter().position(is_bad).map(|i| first + i)
}

/// An owned row-major matrix of f32 or f64.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matrix<T = f64> {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// `rows · cols` elements, row by row.
    pub(crate) data: Vec<T>,
}

impl<T> Matrix<T> {
    /// Of elements row by row.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there are not `rows · cols` of them.
    pub fn new(rows: usize, cols: usize, data: Vec<T>) -> Result<Self> {
        if rows.checked_mul(cols) != Some(data.len()) {
            return Err(Error::Invalid(format!(
                "a {rows} x {cols} matrix has {} elements, but {} were given",
                rows.checked_mul(cols).map_or("too many".to_owned(), |n| n.to_string()),
                data.len()
            )));
        }
        Ok(Self { rows, cols, data })
    }

    /// Rows.
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub const fn cols(&self) -> usize {
        self.cols
    }

    /// `rows · cols` elements, row by row.
    pub fn data(&self) -> &[T] {
        &self.data
    }

    /// The elements, row by row.
    pub fn data_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// The elements, row by row.
    pub fn into_data(self) -> Vec<T> {
        self.data
    }
}

impl<T: Copy + Default> Matrix<T> {
    /// All zeros.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![T::default(); rows * cols] }
    }

    /// Element by element.
    pub fn from_fn(rows: usize, cols: usize, mut f: impl FnMut(usize, usize) -> T) -> Self {
        let mut data = Vec::with_capacity(rows * cols);
        for i in 0..rows {
            for j in 0..cols {
                data.push(f(i, j));
            }
        }
        Self { rows, cols, data }
    }

    /// Of each element what `f` makes of it.
    pub fn map<U>(&self, f: impl FnMut(T) -> U) -> Matrix<U> {
        Matrix { rows: self.rows, cols: self.cols, data: self.data.iter().copied().map(f).collect() }
    }

    /// Row `i`.
    pub fn row(&self, i: usize) -> &[T] {
        &self.data[i * self.cols..(i + 1) * self.cols]
    }

    /// How many columns come before those at the end that are all zero.
    pub(crate) fn used_columns(&self) -> usize
    where
        T: PartialEq,
    {
        let last = |i: usize| self.row(i).iter().rposition(|v| *v != T::default());
        (0..self.rows).filter_map(last).max().map_or(0, |last| last + 1)
    }

    /// The transpose.
    pub fn transposed(&self) -> Self {
        // In blocks, so that lines of a cache that are read in part are still there for the rest.
        const BLOCK: usize = 16;
        let Self { rows, cols, data } = self;
        let mut transposed = Self::zeros(*cols, *rows);
        for first in (0..*cols).step_by(BLOCK) {
            let columns = first..(first + BLOCK).min(*cols);
            for start in (0..*rows).step_by(BLOCK) {
                let end = (start + BLOCK).min(*rows);
                for j in columns.clone() {
                    let out = &mut transposed.data[j * rows + start..j * rows + end];
                    out.iter_mut().zip(start..end).for_each(|(v, i)| *v = data[i * cols + j]);
                }
            }
        }
        transposed
    }
}

impl<T> std::ops::Index<(usize, usize)> for Matrix<T> {
    type Output = T;
    fn index(&self, (i, j): (usize, usize)) -> &T {
        &self.data[i * self.cols + j]
    }
}

impl<T> std::ops::IndexMut<(usize, usize)> for Matrix<T> {
    fn index_mut(&mut self, (i, j): (usize, usize)) -> &mut T {
        &mut self.data[i * self.cols + j]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tensors begin at any byte of a file, and a host's arrays at any address.
    #[test]
    fn bytes_at_any_address_are_read() {
        let values = [1.5f32, -2.0, 0.25, 8.0, -0.5, 3.0];
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let bytes = |v: &f32| match dtype {
                Dtype::F32 => v.to_le_bytes().to_vec(),
                Dtype::F16 => half::f16::from_f32(*v).to_le_bytes().to_vec(),
                Dtype::Bf16 => half::bf16::from_f32(*v).to_le_bytes().to_vec(),
            };
            for start in 0..4 {
                let mut all = vec![0xff; start];
                all.extend(values.iter().flat_map(bytes));
                let (own, cut) = (&all[start..], &all[start..all.len() - 1]);
                let matrix = RawMatrix::new(dtype, 3, 2, own).unwrap();
                let mut wide = [0f64; 6];
                matrix.widen_into(&mut wide);
                assert_eq!(wide, values.map(f64::from), "{dtype} from byte {start}");
                assert_eq!(matrix.row_range(1, 3).to_vec::<f32>(), values[2..]);
                assert_eq!(matrix.first_non_finite(), None);
                assert!(RawMatrix::new(dtype, 3, 2, cut).is_err());
                assert_eq!(RawMatrix::within(dtype, 3, 2, cut).rows(), 0);
            }
        }
    }
}
