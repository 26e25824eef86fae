use std::ops::Range;

use crate::compute::Shape;
use crate::compute::gpu::BIND_ALIGN;
use crate::{Dtype, Error, RawMatrix, Result};

/// Inputs of a linear layer, one token a row.
#[derive(Clone, Copy, Debug)]
pub enum Activations<'a> {
    /// On the host.
    Host(RawMatrix<'a>),
    /// In a buffer of the device, with usage `STORAGE`.
    ///
    /// wgpu binds and copies whole words, of which halves may fill the last one in part: the buffer must go on to the next
    /// multiple of 4. So 1 × 3 halves in a buffer of exactly 6 bytes are refused, and in one of 8 they are taken; what is
    /// beyond the last half is neither used nor changed.
    Buffer {
        /// The buffer, in which the activations end, rounded up to a multiple of 4 bytes.
        buffer: &'a wgpu::Buffer,
        /// Its first byte that counts; a multiple of 4.
        offset: u64,
        /// Element type.
        dtype: Dtype,
        /// Rows.
        tokens: usize,
        /// Columns.
        width: usize,
    },
}

impl<'a> From<RawMatrix<'a>> for Activations<'a> {
    fn from(matrix: RawMatrix<'a>) -> Self {
        Self::Host(matrix)
    }
}

/// Rows that a kernel reads or writes where a host put them.
pub(crate) struct Bound<'a> {
    /// Whole words around them, from where every device can bind.
    pub binding: wgpu::BufferBinding<'a>,
    /// Their first word in it.
    pub word: usize,
}

impl<'a> Activations<'a> {
    /// Tokens × width.
    pub fn shape(&self) -> Shape {
        match *self {
            Self::Host(matrix) => Shape::new(matrix.rows(), matrix.cols()),
            Self::Buffer { tokens, width, .. } => Shape::new(tokens, width),
        }
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Self::Host(matrix) => matrix.dtype(),
            Self::Buffer { dtype, .. } => *dtype,
        }
    }

    /// Bytes of a row.
    pub(crate) fn row_bytes(&self) -> usize {
        Shape::new(1, self.shape().cols).bytes(self.dtype().size())
    }

    /// Refuses what does not lie in its buffer, or where kernels cannot read it.
    pub(crate) fn check(&self, what: &str) -> Result<()> {
        let Self::Buffer { buffer, offset, dtype, .. } = *self else { return Ok(()) };
        let bytes = self.shape().bytes(dtype.size()) as u64;
        // Kernels read and write words, of which wgpu binds whole ones alone.
        let end = bytes.checked_next_multiple_of(4).and_then(|bytes| bytes.checked_add(offset));
        if !offset.is_multiple_of(4) || end.is_none_or(|end| end > buffer.size()) {
            return Err(Error::Invalid(format!(
                "{what}, {bytes} bytes from byte {offset} on, must start at a multiple of 4 and end, rounded up to one, \
                 within its buffer of {} bytes",
                buffer.size()
            )));
        }
        match buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            true => Ok(()),
            false => Err(Error::Invalid(format!("the buffer of {what} needs usage STORAGE"))),
        }
    }

    /// Some rows, of which there must be some with elements; `limit`: bytes that the device can bind at once.
    ///
    /// # Errors
    /// [`Error::Invalid`] as of [`check`](Self::check); [`Error::Device`] if they are on the host, more than the limit, or
    /// begin within a word.
    pub(crate) fn bind(&self, what: &str, rows: Range<usize>, limit: u64) -> Result<Bound<'a>> {
        self.check(what)?;
        let Self::Buffer { buffer, offset, .. } = *self else {
            return Err(Error::Device(format!("{what} must lie in a buffer of the device")));
        };
        let row = self.row_bytes() as u64;
        let start = offset + rows.start as u64 * row;
        let aligned = start - start % BIND_ALIGN as u64;
        let size = (start - aligned + rows.len() as u64 * row).next_multiple_of(4);
        if size > limit || !start.is_multiple_of(4) {
            return Err(Error::Device(format!(
                "{} rows of {row} bytes of {what} do not lie in whole words within the {limit} bytes that the device can \
                 bind at once",
                rows.len()
            )));
        }
        let binding = wgpu::BufferBinding { buffer, offset: aligned, size: wgpu::BufferSize::new(size) };
        Ok(Bound { binding, word: ((start - aligned) / 4) as usize })
    }
}
