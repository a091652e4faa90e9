//! Which file a command is, and handing the process over to it.
//!
//! Owns: the search through the process's own PATH, and the messages of a command that is missing
//! or can't be executed, word for word as engines print and match them. Refuses: nothing else.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;

use hull_proto::FailureKind;
use rustix::fs::{Access, AtFlags, CWD, FileType};
use rustix::io::Errno;

use crate::fault::{Fault, Tried, errno_text};
use crate::sys;

/// A command ready to be executed.
#[derive(Debug)]
pub(crate) struct Command {
    path: String,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

impl Command {
    /// Finds `arguments[0]` as the user and in the directory this process is in.
    ///
    /// # Errors
    /// `NotFound` or `NotExecutable`, in the engines' words.
    pub(crate) fn find(arguments: &[String], environment: &[String]) -> Result<Self, Fault> {
        let name = arguments
            .first()
            .filter(|name| !name.is_empty())
            .ok_or_else(|| Fault::refused("no command specified"))?;
        Ok(Self {
            path: look_up(name, variable(environment, "PATH").unwrap_or(""))?,
            arguments: c_strings(arguments)?,
            environment: c_strings(environment)?,
        })
    }

    /// Becomes the command.
    ///
    /// # Errors
    /// Returns only if it can't be executed.
    pub(crate) fn execute(self) -> Result<Infallible, Fault> {
        let path = CString::new(self.path.as_str())
            .map_err(io::Error::from)
            .or_refuse(|| "command")?;
        let error = sys::execute(&path, &self.arguments, &self.environment);
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let kind = match errno {
            Errno::NOENT => FailureKind::NotFound,
            Errno::NOMEM | Errno::AGAIN => FailureKind::Refused,
            _ => FailureKind::NotExecutable,
        };
        Err(Fault::new(
            kind,
            format!("exec {}: {}", self.path, errno_text(errno)),
        ))
    }
}

/// The value of `name` in a list of `NAME=value`; the last one counts.
pub(crate) fn variable<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    let value = |entry: &'a String| entry.strip_prefix(name)?.strip_prefix('=');
    environment.iter().rev().find_map(value)
}

fn c_strings(strings: &[String]) -> Result<Vec<CString>, Fault> {
    let convert = |string: &String| {
        CString::new(string.as_str())
            .map_err(|_| Fault::refused("an argument or variable contains a zero byte"))
    };
    strings.iter().map(convert).collect()
}

/// The file that `name` means.
fn look_up(name: &str, path: &str) -> Result<String, Fault> {
    if name.contains('/') {
        return match executable(name) {
            Ok(()) => Ok(name.to_owned()),
            Err(Trouble::Stat(errno)) => Err(Fault::new(
                kind_of(errno),
                format!("exec: {name:?}: stat {name}: {}", errno_text(errno)),
            )),
            Err(Trouble::Kind(errno)) => Err(Fault::new(
                FailureKind::NotExecutable,
                format!("exec: {name:?}: {}", errno_text(errno)),
            )),
        };
    }
    let candidate = |dir: &str| match dir {
        "" => format!("./{name}"),
        dir => format!("{dir}/{name}"),
    };
    path.split(':')
        .map(candidate)
        .find(|candidate| executable(candidate).is_ok())
        .ok_or_else(|| {
            Fault::new(
                FailureKind::NotFound,
                format!("exec: {name:?}: executable file not found in $PATH"),
            )
        })
}

fn kind_of(errno: Errno) -> FailureKind {
    if errno == Errno::NOENT {
        FailureKind::NotFound
    } else {
        FailureKind::NotExecutable
    }
}

enum Trouble {
    Stat(Errno),
    Kind(Errno),
}

fn executable(path: &str) -> Result<(), Trouble> {
    let stat = rustix::fs::stat(path).map_err(Trouble::Stat)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(Trouble::Kind(Errno::ISDIR));
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS).map_err(Trouble::Kind)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(path: &std::path::Path, mode: u32) {
        fs::write(path, "").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn fault(name: &str, path: &str) -> (FailureKind, String) {
        let failure = look_up(name, path).unwrap_err().into_failure();
        (failure.kind, failure.message)
    }

    #[test]
    fn the_first_executable_in_the_path_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        fs::create_dir_all(one.join("directory")).unwrap();
        fs::create_dir_all(&two).unwrap();
        file(&one.join("tool"), 0o644);
        file(&two.join("tool"), 0o755);
        file(&two.join("directory"), 0o755);
        let path = format!("{}:{}", one.display(), two.display());
        for name in ["tool", "directory"] {
            let expected = two.join(name).display().to_string();
            assert_eq!(look_up(name, &path).unwrap(), expected);
        }
        assert_eq!(
            fault("tool", &one.display().to_string()),
            (
                FailureKind::NotFound,
                "exec: \"tool\": executable file not found in $PATH".into()
            )
        );
    }

    #[test]
    fn a_path_says_what_is_wrong_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().display();
        let plain = format!("{dir}/plain");
        file(plain.as_ref(), 0o644);
        let missing = format!("{dir}/missing");
        assert_eq!(
            fault(&missing, ""),
            (
                FailureKind::NotFound,
                format!("exec: \"{missing}\": stat {missing}: no such file or directory")
            )
        );
        assert_eq!(
            fault(&plain, ""),
            (
                FailureKind::NotExecutable,
                format!("exec: \"{plain}\": permission denied")
            )
        );
        assert_eq!(fault(&format!("{dir}"), "").0, FailureKind::NotExecutable);
        assert_eq!(
            fault(&format!("{plain}/x"), "").0,
            FailureKind::NotExecutable
        );
    }

    #[test]
    fn the_last_value_of_a_variable_counts() {
        let environment = ["A=1".to_owned(), "AB=2".into(), "A=3".into()];
        assert_eq!(variable(&environment, "A"), Some("3"));
        assert_eq!(variable(&environment, "B"), None);
    }
}
