//! Arrays of Python: numpy's, any with DLPack or a buffer; and numpy's views of tensors that Rust holds.

use std::ffi::{CStr, c_void};

use loraweld::Dtype;
use numpy::ndarray::{ArrayViewD, IxDyn};
use numpy::{
    Element, PyArray1, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods, PyTuple};

use crate::error::Raised;

/// An array of f32, f16 or bf16 in C order. What is borrowed is Python's, which must not change it meanwhile.
pub struct Array {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    data: Data,
}

enum Data {
    Borrowed { pointer: *const u8, len: usize, _owner: Py<PyAny> },
    Owned(Vec<u8>),
}

impl Array {
    /// `what` says in errors which array it is.
    pub fn new(x: &Bound<'_, PyAny>, what: &str) -> PyResult<Self> {
        if let Ok(array) = x.cast::<PyUntypedArray>() {
            return Self::of_numpy(array, what);
        }
        if x.hasattr("__dlpack__")? {
            return Self::of_dlpack(x, what);
        }
        let py = x.py();
        let view = py.import("builtins")?.getattr("memoryview")?.call1((x,)).map_err(|_| {
            let kind = x.get_type().name().map_or_else(|_| "unknown".to_owned(), |name| name.to_string());
            Raised::new("ArrayError", format!("{what} is of type {kind}; expected an array with DLPack or a buffer, such as numpy's or torch's"))
        })?;
        let array = py.import("numpy")?.call_method1("asarray", (view,))?;
        Self::of_numpy(array.cast()?, what)
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            Data::Owned(bytes) => bytes,
            // SAFETY: the owner, which is kept, has so many bytes there.
            Data::Borrowed { pointer, len, .. } => unsafe { bytes(*pointer, *len) },
        }
    }

    /// Rows and columns: all dimensions but the last are rows.
    pub fn matrix(&self, what: &str) -> PyResult<(usize, usize)> {
        match self.shape.split_last() {
            Some((&cols, rows)) if !rows.is_empty() => Ok((rows.iter().product(), cols)),
            _ => Err(Raised::new(
                "ArrayError",
                format!(
                    "{what} has the shape {:?}; expected [tokens, width], or more dimensions in front",
                    self.shape
                ),
            )
            .into()),
        }
    }

    fn of_numpy(array: &Bound<'_, PyUntypedArray>, what: &str) -> PyResult<Self> {
        let descr = array.dtype();
        let name: String = descr.getattr("name")?.extract()?;
        let dtype = match name.as_str() {
            "float32" => Dtype::F32,
            "float16" => Dtype::F16,
            "bfloat16" => Dtype::Bf16,
            _ => return Err(wrong_type(what, &name)),
        };
        if descr.is_native_byteorder() == Some(false) {
            return Err(wrong_type(what, &format!("{name} in another byte order")));
        }
        if !array.is_c_contiguous() {
            let copy = array.py().import("numpy")?.call_method1("ascontiguousarray", (array,))?;
            return Self::of_numpy(copy.cast()?, what);
        }
        let shape = array.shape().to_vec();
        let len = shape.iter().product::<usize>() * dtype.size();
        // SAFETY: it is an array, whose data are in one piece.
        let pointer = unsafe { (*array.as_array_ptr()).fields.data }.cast_const().cast();
        let owner = array.clone().into_any().unbind();
        Ok(Self { dtype, shape, data: Data::Borrowed { pointer, len, _owner: owner } })
    }

    fn of_dlpack(x: &Bound<'_, PyAny>, what: &str) -> PyResult<Self> {
        let (kind, _): (i32, i32) = x.call_method0("__dlpack_device__")?.cast_into::<PyTuple>()?.extract()?;
        // The CPU's memory, and what CUDA and ROCm keep there.
        if ![1, 3, 11].contains(&kind) {
            let message =
                format!("{what} is not in the CPU's memory; move it there first, as `x.cpu()` does");
            return Err(Raised::new("ArrayError", message).into());
        }
        let capsule = x.call_method0("__dlpack__")?.cast_into::<PyCapsule>()?;
        const NAME: &CStr = c"dltensor";
        let pointer = capsule.pointer_checked(Some(NAME))?.cast::<DlTensor>();
        // SAFETY: a capsule of this name holds a managed tensor, which begins with a tensor, and which lives as long as it.
        let tensor = unsafe { pointer.as_ref() };
        let dtype = match (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) {
            (2, 32, 1) => Dtype::F32,
            (2, 16, 1) => Dtype::F16,
            (4, 16, 1) => Dtype::Bf16,
            (2, bits, 1) => return Err(wrong_type(what, &format!("float{bits}"))),
            (code, bits, _) => return Err(wrong_type(what, &format!("DLPack's code {code} of {bits} bits"))),
        };
        let rank = usize::try_from(tensor.ndim).unwrap_or(0);
        // SAFETY: `shape`, and `strides` unless it is null, have `ndim` elements.
        let (shape, strides) = unsafe { (dims(tensor.shape, rank), dims(tensor.strides, rank)) };
        let shape: Vec<usize> = shape.iter().map(|&n| usize::try_from(n).unwrap_or(0)).collect();
        let size = dtype.size();
        let len = shape.iter().product::<usize>() * size;
        let first = tensor.data.cast_const().cast::<u8>().wrapping_add(tensor.byte_offset as usize);
        let steps = match strides.is_empty() {
            true => None,
            false => Some(strides).filter(|strides| !in_one_piece(&shape, strides)),
        };
        let data = match steps {
            None => Data::Borrowed { pointer: first, len, _owner: capsule.into_any().unbind() },
            Some(strides) => {
                let mut out = Vec::with_capacity(len);
                // SAFETY: strides lead to elements of the tensor.
                unsafe { gather(first, &shape, strides, size, &mut out) };
                Data::Owned(out)
            }
        };
        Ok(Self { dtype, shape, data })
    }
}

fn wrong_type(what: &str, name: &str) -> PyErr {
    Raised::new("ArrayError", format!("{what} is of {name}; expected float32, float16 or bfloat16")).into()
}

/// # Safety
/// There are so many bytes, unless there are none.
unsafe fn bytes<'a>(pointer: *const u8, len: usize) -> &'a [u8] {
    match len {
        0 => &[],
        // SAFETY: as above.
        _ => unsafe { std::slice::from_raw_parts(pointer, len) },
    }
}

/// # Safety
/// `pointer` is null, or there are so many.
unsafe fn dims<'a>(pointer: *const i64, rank: usize) -> &'a [i64] {
    match pointer.is_null() || rank == 0 {
        true => &[],
        // SAFETY: as above.
        false => unsafe { std::slice::from_raw_parts(pointer, rank) },
    }
}

/// Whether elements follow each other in C order.
fn in_one_piece(shape: &[usize], strides: &[i64]) -> bool {
    let mut next = 1;
    shape.iter().zip(strides).rev().all(|(&n, &stride)| {
        let fits = n <= 1 || stride == next;
        next *= n as i64;
        fits
    })
}

/// Copies elements in C order.
///
/// # Safety
/// Every index of the shape leads to an element.
unsafe fn gather(at: *const u8, shape: &[usize], strides: &[i64], size: usize, out: &mut Vec<u8>) {
    let ([n, shape @ ..], [stride, strides @ ..]) = (shape, strides) else {
        // SAFETY: as above.
        out.extend_from_slice(unsafe { std::slice::from_raw_parts(at, size) });
        return;
    };
    for i in 0..*n {
        let at = at.wrapping_offset(i as isize * *stride as isize * size as isize);
        // SAFETY: as above.
        unsafe { gather(at, shape, strides, size, out) };
    }
}

/// DLPack's description of a tensor.
#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    ndim: i32,
    dtype: DlDtype,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct DlDevice {
    kind: i32,
    index: i32,
}

#[repr(C)]
struct DlDtype {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// A tensor as numpy sees it, without a copy where its type and place allow that; it cannot be written to.
///
/// numpy has no bf16: such a tensor is widened to float32, which is exact, or, with `bits`, seen as uint16.
///
/// # Safety
/// `owner` keeps `bytes`, and nothing changes them.
pub unsafe fn view<'py>(
    owner: &Bound<'py, PyAny>,
    bytes: &[u8],
    dtype: safetensors::Dtype,
    shape: &[usize],
    bits: bool,
) -> PyResult<Bound<'py, PyAny>> {
    use safetensors::Dtype;
    let py = owner.py();
    match dtype {
        Dtype::BF16 if !bits => {
            let mut values = vec![0f32; bytes.len() / 2];
            py.detach(|| {
                let halves = bytes.as_chunks::<2>().0;
                values.iter_mut().zip(halves).for_each(|(v, b)| *v = half::bf16::from_le_bytes(*b).to_f32());
            });
            Ok(PyArray1::from_vec(py, values).reshape(shape.to_vec())?.into_any())
        }
        // SAFETY: as above.
        Dtype::BF16 | Dtype::U16 => unsafe { typed::<u16>(owner, bytes, shape) },
        // SAFETY: as above.
        Dtype::F32 => unsafe { typed::<f32>(owner, bytes, shape) },
        // SAFETY: as above.
        Dtype::F16 => unsafe { typed::<half::f16>(owner, bytes, shape) },
        // SAFETY: as above.
        Dtype::F64 => unsafe { typed::<f64>(owner, bytes, shape) },
        // SAFETY: as above.
        Dtype::I64 => unsafe { typed::<i64>(owner, bytes, shape) },
        // SAFETY: as above.
        Dtype::I32 => unsafe { typed::<i32>(owner, bytes, shape) },
        // SAFETY: as above.
        Dtype::U8 => unsafe { typed::<u8>(owner, bytes, shape) },
        // SAFETY: as above.
        Dtype::F8_E4M3 | Dtype::F8_E5M2 if bits => unsafe { typed::<u8>(owner, bytes, shape) },
        other => Err(PyTypeError::new_err(format!(
            "numpy has no type for {other}; `bits=True` gives what there is"
        ))),
    }
}

/// # Safety
/// As [`view`].
unsafe fn typed<'py, T: Element + Copy>(
    owner: &Bound<'py, PyAny>,
    bytes: &[u8],
    shape: &[usize],
) -> PyResult<Bound<'py, PyAny>> {
    let pointer = bytes.as_ptr().cast::<T>();
    let count = bytes.len() / size_of::<T>();
    if !pointer.is_aligned() || cfg!(target_endian = "big") {
        // SAFETY: there are so many, all of whose bits are values.
        let values = (0..count).map(|i| unsafe { pointer.add(i).read_unaligned() }).collect();
        return Ok(PyArray1::<T>::from_vec(owner.py(), values).reshape(shape.to_vec())?.into_any());
    }
    // SAFETY: there are so many, at their alignment.
    let view = unsafe { ArrayViewD::from_shape_ptr(IxDyn(shape), pointer) };
    // SAFETY: the owner keeps them.
    let array = unsafe { PyArrayDyn::borrow_from_array(&view, owner.clone()) };
    // The memory may be a file's, mapped for reading alone.
    array.try_readwrite().map_err(|e| PyTypeError::new_err(e.to_string()))?.make_nonwriteable();
    Ok(array.into_any())
}
