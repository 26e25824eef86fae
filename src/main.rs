//! The `loraweld` command.

fn main() -> std::process::ExitCode {
    #[cfg(target_os = "linux")]
    without_desktop();
    loraweld::cli::main()
}

/// Keeps Mesa's drivers quiet on machines without a desktop. They look for its socket in `XDG_RUNTIME_DIR`, and if that is
/// no absolute path, libwayland complains on stderr. No folder at all is an answer that it takes in silence.
#[cfg(target_os = "linux")]
fn without_desktop() {
    const NAME: &str = "XDG_RUNTIME_DIR";
    if std::env::var_os(NAME).is_none_or(|path| !std::path::Path::new(&path).is_absolute()) {
        // SAFETY: nothing ran before this in `main`, so no other thread reads or writes the environment.
        unsafe { std::env::set_var(NAME, "/dev/null") };
    }
}
