//! Maps of files, and what the command line says when another program cuts one short.

use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

/// A mapped file.
#[derive(Debug)]
pub(crate) struct Mapped {
    map: Mmap,
    #[cfg(all(unix, feature = "cli"))]
    _listed: Option<signal::Listed>,
}

impl Mapped {
    pub fn new(map: Mmap, path: &Path) -> Self {
        #[cfg(all(unix, feature = "cli"))]
        return Self { _listed: signal::Listed::new(&map, path), map };
        #[cfg(not(all(unix, feature = "cli")))]
        {
            let _ = path;
            Self { map }
        }
    }
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(all(unix, feature = "cli"))]
pub(crate) use signal::end_when_cut;

/// Touching what is no more in a mapped file raises SIGBUS. A library leaves that signal to its host; the command line
/// owns the process, and says which file it was.
#[cfg(all(unix, feature = "cli"))]
mod signal {
    use std::mem::MaybeUninit;
    use std::os::unix::ffi::OsStrExt;
    use std::path::Path;
    use std::ptr;
    use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

    /// Whether the handler is there; only then are maps listed.
    static HANDLED: AtomicBool = AtomicBool::new(false);

    /// The listed maps, which a handler may look at at any moment.
    static MAPS: [Map; 256] = [const { Map::new() }; 256];

    struct Map {
        taken: AtomicBool,
        start: AtomicUsize,
        end: AtomicUsize,
        name: AtomicPtr<u8>,
        length: AtomicUsize,
    }

    impl Map {
        const fn new() -> Self {
            Self {
                taken: AtomicBool::new(false),
                start: AtomicUsize::new(0),
                end: AtomicUsize::new(0),
                name: AtomicPtr::new(ptr::null_mut()),
                length: AtomicUsize::new(0),
            }
        }
    }

    /// A map's place in the list.
    #[derive(Debug)]
    pub struct Listed(usize);

    impl Listed {
        pub fn new(map: &[u8], path: &Path) -> Option<Self> {
            if !HANDLED.load(Ordering::Acquire) {
                return None;
            }
            let free = |map: &Map| !map.taken.swap(true, Ordering::AcqRel);
            let place = MAPS.iter().position(free)?;
            // Names are never freed, since the handler may be reading one: a command opens few files.
            let name: &'static [u8] = path.as_os_str().as_bytes().to_vec().leak();
            let (range, slot) = (map.as_ptr_range(), &MAPS[place]);
            slot.length.store(0, Ordering::Release);
            slot.name.store(name.as_ptr().cast_mut(), Ordering::Release);
            slot.length.store(name.len(), Ordering::Release);
            slot.start.store(range.start as usize, Ordering::Release);
            slot.end.store(range.end as usize, Ordering::Release);
            Some(Self(place))
        }
    }

    impl Drop for Listed {
        fn drop(&mut self) {
            let slot = &MAPS[self.0];
            slot.end.store(0, Ordering::Release);
            slot.start.store(0, Ordering::Release);
            slot.taken.store(false, Ordering::Release);
        }
    }

    /// From here on, a mapped file that is cut ends the program with exit code 1 and a message that names it.
    pub fn end_when_cut() {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: all zeros are a valid `sigaction`, whose mask is then emptied and whose handler takes three arguments, as
        // SA_SIGINFO asks. The handler calls nothing but what POSIX allows in one, see there.
        let set = unsafe {
            let action = action.assume_init_mut();
            libc::sigemptyset(&mut action.sa_mask);
            action.sa_flags = libc::SA_SIGINFO | libc::SA_RESETHAND;
            action.sa_sigaction = cut as extern "C" fn(_, _, _) as *const () as usize;
            libc::sigaction(libc::SIGBUS, action, ptr::null_mut())
        };
        HANDLED.store(set == 0, Ordering::Release);
    }

    extern "C" fn cut(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: the system gives a valid `siginfo_t`, and for SIGBUS it holds an address.
        let address = unsafe { (*info).si_addr() } as usize;
        let is_in = |map: &&Map| {
            (map.start.load(Ordering::Acquire)..map.end.load(Ordering::Acquire)).contains(&address)
        };
        let Some(map) = MAPS.iter().find(is_in) else {
            // Not a file of ours: the signal comes again, and ends the program as it does without a handler.
            return;
        };
        let (name, length) = (map.name.load(Ordering::Acquire), map.length.load(Ordering::Acquire));
        let why =
            b": cannot read: it was cut short by another program meanwhile; nothing was written of it\n";
        // SAFETY: `write` and `_exit` may be called in a handler. The name is as long as it says, and never freed.
        unsafe {
            for (bytes, count) in
                [(c"error: ".as_ptr().cast(), 7), (name, length), (why.as_ptr().cast_mut(), why.len())]
            {
                libc::write(2, bytes.cast(), count);
            }
            libc::_exit(1);
        }
    }

    #[cfg(test)]
    mod tests {
        use std::io::Write;
        use std::process::Command;

        use super::super::super::File;

        const CHILD: &str = "LORAWELD_TEST_CUT_MAP";

        /// Runs in a process of its own, which it ends.
        #[test]
        fn a_mapped_file_that_is_cut_is_an_error_that_names_it() {
            let Some(path) = std::env::var_os(CHILD) else {
                let mut file = tempfile::NamedTempFile::new().unwrap();
                file.write_all(&[7; 1 << 16]).unwrap();
                let name = std::thread::current().name().unwrap().to_owned();
                let mut child = Command::new(std::env::current_exe().unwrap());
                let child = child.args([&name, "--exact", "--nocapture"]).env(CHILD, file.path());
                let output = child.output().unwrap();
                let said = String::from_utf8_lossy(&output.stderr);
                let wanted = format!("error: {}: cannot read: it was cut short", file.path().display());
                assert!(
                    output.status.code() == Some(1) && said.contains(&wanted),
                    "{:?} {said}",
                    output.status
                );
                return;
            };
            super::end_when_cut();
            let map = File::open(path.as_ref()).unwrap().map().unwrap();
            std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4096).unwrap();
            assert_eq!(map[4095], 7);
            println!("{}", map[1 << 15]);
            unreachable!("what is not there was read");
        }
    }
}
