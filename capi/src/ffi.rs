//! Pointers in and out. NULL is refused by the argument's name; what else the caller owes is in the header's opening.

use std::ffi::{CStr, CString, c_char};

use crate::status::{Failure, LoraweldStatus, Result, guard};

fn null(name: &str) -> Failure {
    Failure::invalid(format!("`{name}` is NULL"))
}

/// What `pointer` points to.
///
/// # Safety
/// It is NULL, or valid for reads for as long as the call lasts, and nobody writes there meanwhile.
pub(crate) unsafe fn get<'a, T>(pointer: *const T, name: &str) -> Result<&'a T> {
    // SAFETY: as above.
    unsafe { pointer.as_ref() }.ok_or_else(|| null(name))
}

/// A string.
///
/// # Safety
/// As [`get`], up to a NUL.
pub(crate) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    // SAFETY: as above.
    unsafe { optional_text(pointer, name) }?.ok_or_else(|| null(name))
}

/// A string, or NULL.
///
/// # Safety
/// As [`text`].
pub(crate) unsafe fn optional_text<'a>(pointer: *const c_char, name: &str) -> Result<Option<&'a str>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: as above.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map(Some).map_err(|e| Failure::invalid(format!("`{name}` is not UTF-8: {e}")))
}

/// An array. NULL may stand for one of no elements.
///
/// # Safety
/// As [`get`], for `count` elements.
pub(crate) unsafe fn slice<'a, T>(pointer: *const T, count: usize, name: &str) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if pointer.is_null() {
        return Err(null(name));
    }
    if !pointer.is_aligned() {
        return Err(Failure::invalid(format!("`{name}` is not aligned to its elements' size")));
    }
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Failure::invalid(format!("`{name}` of {count} elements is larger than memory")));
    }
    // SAFETY: as above, and the size and the alignment are right.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// Where a result goes. NULL is there until it is [put](Out::put).
pub(crate) struct Out<'a, T>(&'a mut *mut T);

impl<'a, T> Out<'a, T> {
    /// # Safety
    /// As [`get`], for writes.
    pub(crate) unsafe fn new(pointer: *mut *mut T, name: &str) -> Result<Self> {
        // SAFETY: as above.
        let out = unsafe { pointer.as_mut() }.ok_or_else(|| null(name))?;
        *out = std::ptr::null_mut();
        Ok(Self(out))
    }

    /// Gives a value to the caller, who frees it.
    pub(crate) fn put(self, value: T) {
        *self.0 = Box::into_raw(Box::new(value));
    }
}

/// Frees what [`Out::put`] gave away, unless it is NULL.
///
/// # Safety
/// It came from [`Out::put`], was not freed, and is not in use.
pub(crate) unsafe fn free<T>(pointer: *mut T) {
    if pointer.is_null() {
        return;
    }
    // SAFETY: as above.
    let value = unsafe { Box::from_raw(pointer) };
    let _: LoraweldStatus = guard(|| {
        drop(value);
        Ok(())
    });
}

/// Text for C, which has no NUL in it.
pub(crate) fn c_string(text: &str) -> CString {
    CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default()
}

/// A string of a handle; NULL if there is no handle.
///
/// # Safety
/// As [`get`].
pub(crate) unsafe fn field<T>(handle: *const T, of: impl FnOnce(&T) -> &CStr) -> *const c_char {
    // SAFETY: as above.
    unsafe { handle.as_ref() }.map_or(std::ptr::null(), |handle| of(handle).as_ptr())
}
