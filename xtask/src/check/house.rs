//! The house rules that no lint knows: lengths, names, module headers, and the rooms in which
//! `unsafe` may stand.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Longest source file, in lines; its tests count.
const MAX_FILE_LINES: usize = 600;

/// Longest ARCHITECTURE.md, in lines.
const MAX_ARCHITECTURE_LINES: usize = 150;

/// Words that name no thing.
const EMPTY_NAMES: &[&str] = &[
    "util", "utils", "manager", "helper", "helpers", "inner", "common", "misc",
];

/// The rooms in which `unsafe` may stand (ARCHITECTURE.md, "Invariants").
const UNSAFE_ROOMS: &[&str] = &[
    "vmm/src/kvm/",
    "vmm/src/memory/",
    "guest-agent/src/sys",
    "sandbox/src/sys",
    "tests/src/host/sys",
    "tests/src/bin/",
];

pub(super) fn check() -> Result<()> {
    let listed = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .output()
        .context("cannot list the tree's files")?;
    let listed = String::from_utf8(listed.stdout).context("a file name is not UTF-8")?;
    let mut faults = Vec::new();
    for path in listed
        .split('\0')
        .map(PathBuf::from)
        .filter(|path| path.is_file())
    {
        if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            faults.extend(source_faults(&path, &text));
        }
        faults.extend(name_fault(&path));
    }
    let map = fs::read_to_string("ARCHITECTURE.md").context("cannot read ARCHITECTURE.md")?;
    if map.lines().count() > MAX_ARCHITECTURE_LINES {
        faults.push(format!(
            "ARCHITECTURE.md is over {MAX_ARCHITECTURE_LINES} lines"
        ));
    }
    if !faults.is_empty() {
        bail!("{} faults:\n  {}", faults.len(), faults.join("\n  "));
    }
    Ok(())
}

fn source_faults(path: &Path, text: &str) -> Vec<String> {
    let shown = path.display();
    let mut faults = Vec::new();
    let lines = text.lines().count();
    if lines > MAX_FILE_LINES {
        faults.push(format!(
            "{shown} has {lines} lines, over {MAX_FILE_LINES}: two rooms"
        ));
    }
    if !text.starts_with("//!") && !text.starts_with("#!") {
        faults.push(format!("{shown} doesn't begin with a `//!` header"));
    }
    let roomy = UNSAFE_ROOMS
        .iter()
        .any(|room| path.starts_with(room) || starts_with(path, room));
    let opens = text.lines().any(|line| {
        let line = line.trim_start();
        line.contains("unsafe_code") && line.starts_with('#') && !line.contains("forbid")
    });
    if opens && !roomy {
        faults.push(format!("{shown} opens `unsafe` outside the named rooms"));
    }
    faults
}

fn starts_with(path: &Path, room: &str) -> bool {
    path.to_str().is_some_and(|path| path.starts_with(room))
}

fn name_fault(path: &Path) -> Option<String> {
    let stem = path.file_stem()?.to_str()?;
    EMPTY_NAMES.contains(&stem).then(|| {
        format!(
            "{} is named after nothing: say what it holds",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_without_a_header_is_a_fault() {
        assert_eq!(
            source_faults(Path::new("a/src/b.rs"), "fn main() {}\n").len(),
            1
        );
        assert_eq!(source_faults(Path::new("a/src/b.rs"), "//! B.\n").len(), 0);
    }

    #[test]
    fn unsafe_is_opened_only_in_its_rooms() {
        let text = concat!("//! B.\n#![expect(unsafe", "_code, reason = \"x\")]\n");
        assert_eq!(source_faults(Path::new("cli/src/main.rs"), text).len(), 1);
        assert_eq!(
            source_faults(Path::new("vmm/src/kvm/vcpu.rs"), text).len(),
            0
        );
        assert_eq!(
            source_faults(Path::new("sandbox/src/sys.rs"), text).len(),
            0
        );
    }

    #[test]
    fn empty_names_are_faults() {
        assert!(name_fault(Path::new("cli/src/utils.rs")).is_some());
        assert!(name_fault(Path::new("cli/src/run.rs")).is_none());
    }
}
