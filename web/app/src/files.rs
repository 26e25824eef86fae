//! The page's files: those that were chosen are read piece by piece, and results go to the browser's private file system,
//! or to memory where that gives no room.

use std::cell::RefCell;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use js_sys::Uint8Array;
use loraweld::browser::{self, Room};
use loraweld::{ReadAt, WriteAt};
use wasm_bindgen::prelude::*;
use web_sys::{Blob, FileReaderSync, FileSystemReadWriteOptions, FileSystemSyncAccessHandle};

/// Bytes that a browser reads at once.
const WINDOW: usize = 32 << 20;

/// Bytes that are read at least where a file is read in a row: each read asks another process, which takes as long as a
/// megabyte.
const AHEAD: usize = 4 << 20;

/// Bytes that may lie between two reads in a row: tensors as small as an alpha.
const GAP: u64 = 4 << 10;

thread_local! {
    // What is JavaScript's stays on its thread; the library knows it by its number.
    static CHOSEN: RefCell<Vec<Option<(Blob, FileReaderSync)>>> = const { RefCell::new(Vec::new()) };
    static ROOMS: RefCell<Vec<FileSystemSyncAccessHandle>> = const { RefCell::new(Vec::new()) };
    /// The rooms that something was written to.
    static TAKEN: RefCell<Vec<Arc<Private>>> = const { RefCell::new(Vec::new()) };
}

/// Lends a file to commands, under a name.
#[wasm_bindgen]
pub fn lend(name: String, file: Blob) -> Result<(), JsValue> {
    let size = file.size() as u64;
    let chosen = Some((file, FileReaderSync::new()?));
    let number = CHOSEN.with_borrow_mut(|all| {
        all.push(chosen);
        all.len() - 1
    });
    browser::lend(name, Arc::new(Chosen { number, size, ahead: Mutex::default() }));
    Ok(())
}

/// Takes a file back that was lent.
#[wasm_bindgen]
pub fn forget(name: &str) {
    browser::take(name);
}

/// Gives room for the files that the next command writes. What finds none goes to memory.
#[wasm_bindgen]
pub fn give_room(handles: Vec<FileSystemSyncAccessHandle>) {
    let mut left = 0..handles.len();
    ROOMS.set(handles);
    TAKEN.take();
    browser::set_rooms(Box::new(move || {
        let Some(number) = left.next() else {
            return Ok(Arc::new(Memory::default()) as Arc<dyn Room>);
        };
        let room = Arc::new(Private(number));
        TAKEN.with_borrow_mut(|taken| taken.push(room.clone()));
        Ok(room)
    }));
}

/// Takes a file that was written: the room that it is in, or its bytes, if they are in memory.
#[wasm_bindgen]
pub fn take(name: &str) -> Result<JsValue, JsValue> {
    let Some(file) = browser::take(name) else { return Ok(JsValue::UNDEFINED) };
    let room = TAKEN.with_borrow(|taken| {
        let is_it = |room: &&Arc<Private>| std::ptr::addr_eq(Arc::as_ptr(room), Arc::as_ptr(&file));
        taken.iter().find(is_it).map(|room| room.0)
    });
    if let Some(number) = room {
        return Ok(ROOMS.with_borrow(|rooms| rooms[number].clone()).into());
    }
    let mut bytes = vec![0; file.size() as usize];
    file.read_at(&mut bytes, 0).map_err(|e| JsValue::from_str(&e.to_string()))?;
    Ok(Uint8Array::from(&bytes[..]).into())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each guarded value is valid after every statement, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(error: JsValue) -> io::Error {
    let text = error.dyn_ref::<js_sys::Error>().map(|error| String::from(error.message()));
    io::Error::other(text.unwrap_or_else(|| format!("{error:?}")))
}

/// A file that was chosen on the page, by its number.
struct Chosen {
    number: usize,
    size: u64,
    ahead: Mutex<Ahead>,
}

/// What was read ahead.
#[derive(Default)]
struct Ahead {
    bytes: Vec<u8>,
    /// Where they start.
    start: u64,
    /// Where the last read ended.
    end: u64,
    /// Reads until then that began where the one before ended, or a little behind.
    in_a_row: usize,
}

impl Ahead {
    /// The bytes at a place, if all are here.
    fn get(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let from = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        self.bytes.get(from..)?.get(..len)
    }
}

impl ReadAt for Chosen {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut ahead, len) = (lock(&self.ahead), buffer.len());
        let follows = (ahead.end..=ahead.end + GAP).contains(&offset);
        ahead.in_a_row = if follows { ahead.in_a_row + 1 } else { 0 };
        ahead.end = offset + len as u64;
        if let Some(bytes) = ahead.get(offset, len) {
            buffer.copy_from_slice(bytes);
            return Ok(());
        }
        let rest = self.size.saturating_sub(offset);
        // The two factors of a layer follow each other, wherever the next layer is.
        if ahead.in_a_row < 2 || len >= AHEAD || rest < len as u64 {
            return self.read(buffer, offset);
        }
        let mut bytes = std::mem::take(&mut ahead.bytes);
        bytes.resize(rest.min(AHEAD as u64) as usize, 0);
        self.read(&mut bytes, offset)?;
        buffer.copy_from_slice(&bytes[..len]);
        (ahead.bytes, ahead.start) = (bytes, offset);
        Ok(())
    }
}

impl Chosen {
    /// Asks the browser.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let chosen = CHOSEN.with_borrow(|all| all.get(self.number).cloned().flatten());
        let (file, reader) = chosen.ok_or(io::ErrorKind::NotFound)?;
        let mut start = offset;
        for window in buffer.chunks_mut(WINDOW) {
            let end = start + window.len() as u64;
            let part = file.slice_with_f64_and_f64(start as f64, end as f64);
            let bytes = part.and_then(|part| reader.read_as_array_buffer(&part)).map_err(failed)?;
            let bytes = Uint8Array::new(&bytes);
            if bytes.length() as usize != window.len() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes.copy_to(window);
            start = end;
        }
        Ok(())
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        CHOSEN.with_borrow_mut(|all| all[self.number] = None);
    }
}

/// A file of the browser's private file system, by its number.
struct Private(usize);

impl Private {
    fn with<T>(&self, call: impl FnOnce(&FileSystemSyncAccessHandle) -> Result<T, JsValue>) -> io::Result<T> {
        let handle = ROOMS.with_borrow(|rooms| rooms.get(self.0).cloned()).ok_or(io::ErrorKind::NotFound)?;
        call(&handle).map_err(failed)
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let read = self.with(|handle| handle.read_with_u8_array_and_options(buffer, &at(offset)))?;
        if read == buffer.len() as f64 { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

fn at(offset: u64) -> FileSystemReadWriteOptions {
    let options = FileSystemReadWriteOptions::new();
    options.set_at(offset as f64);
    options
}

impl ReadAt for Private {
    fn size(&self) -> u64 {
        self.with(FileSystemSyncAccessHandle::get_size).map_or(0, |bytes| bytes as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.fill(buffer, offset)
    }
}

impl WriteAt for Private {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let written = self.with(|handle| handle.write_with_u8_array_and_options(bytes, &at(offset)))?;
        if written == bytes.len() as f64 { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.fill(buffer, offset)
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        self.with(|handle| handle.truncate_with_f64(bytes as f64))
    }
}

/// A file in memory.
#[derive(Default)]
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn all(&self) -> MutexGuard<'_, Vec<u8>> {
        lock(&self.0)
    }

    fn fill(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let all = self.all();
        let from = all.get(offset as usize..).and_then(|bytes| bytes.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

impl ReadAt for Memory {
    fn size(&self) -> u64 {
        self.all().len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.fill(buffer, offset)
    }
}

impl WriteAt for Memory {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let (start, mut all) = (offset as usize, self.all());
        let end = start + bytes.len();
        let more = end.saturating_sub(all.len());
        all.try_reserve(more)?;
        if more > 0 {
            all.resize(end, 0);
        }
        all[start..end].copy_from_slice(bytes);
        Ok(())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.fill(buffer, offset)
    }

    fn set_size(&self, bytes: u64) -> io::Result<()> {
        let (size, mut all) = (usize::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?, self.all());
        let more = size.saturating_sub(all.len());
        all.try_reserve(more)?;
        all.resize(size, 0);
        Ok(())
    }
}
