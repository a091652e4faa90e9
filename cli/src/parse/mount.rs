//! `-v`, `--mount` and `--tmpfs`.

use std::path::{Path, PathBuf};

use hull_sandbox::{Tmpfs, Volume, VolumeSource};

use super::Invalid;

/// What one `--mount` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mount {
    /// `type=bind` or `type=volume`.
    Volume(Volume),
    /// `type=tmpfs`.
    Tmpfs(Tmpfs),
}

/// Reads `-v [SOURCE:]TARGET[:OPTIONS]`. Relative sources (`.`, `./x`, `../x`) are below the
/// working directory `cwd`.
pub(crate) fn volume(text: &str, cwd: &Path) -> Result<Volume, Invalid> {
    let parts: Vec<&str> = text.split(':').collect();
    let (source, target, options) = match parts[..] {
        [target] => (None, target, ""),
        [source, target] => (Some(source), target, ""),
        [source, target, options] => (Some(source), target, options),
        _ => return Err(Invalid::new("expected [SOURCE:]TARGET[:OPTIONS]")),
    };
    let mut read_only = false;
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "ro" | "readonly" => read_only = true,
            // The rest is what a guest's mount always is: its own, unlabelled and coherent.
            "rw" | "z" | "Z" | "cached" | "delegated" | "consistent" | "rprivate" | "private" => {}
            _ => return Err(Invalid::new(format!("unknown volume option '{option}'"))),
        }
    }
    Ok(Volume {
        source: match source {
            None => VolumeSource::Anonymous,
            Some(source) => VolumeSource::Host(host_path(source, cwd)?),
        },
        target: container_path(target)?,
        read_only,
    })
}

fn host_path(source: &str, cwd: &Path) -> Result<PathBuf, Invalid> {
    if source.is_empty() {
        return Err(Invalid::new("the source is empty"));
    }
    let relative =
        matches!(source, "." | "..") || source.starts_with("./") || source.starts_with("../");
    if source.starts_with('/') || relative {
        return Ok(cwd.join(source));
    }
    Err(Invalid::new(format!(
        "'{source}' would be a named volume, which hull does not have yet; write ./{source} for a \
         directory here or an absolute path"
    )))
}

fn container_path(target: &str) -> Result<String, Invalid> {
    if !target.starts_with('/') {
        return Err(Invalid::new(format!(
            "mount path must be absolute: '{target}'"
        )));
    }
    if target.bytes().all(|byte| byte == b'/') {
        return Err(Invalid::new("the target can't be '/'"));
    }
    Ok(target.to_owned())
}

/// Reads `--tmpfs TARGET[:OPTIONS]`.
pub(crate) fn tmpfs(text: &str) -> Result<Tmpfs, Invalid> {
    let (target, options) = text.split_once(':').unwrap_or((text, ""));
    Ok(Tmpfs {
        target: container_path(target)?,
        options: options
            .split(',')
            .filter(|option| !option.is_empty())
            .map(str::to_owned)
            .collect(),
    })
}

/// Reads `--mount type=bind,source=/a,target=/b,readonly`. Unlike `-v`, a missing source is an
/// error, and so is a relative one.
pub(crate) fn mount(text: &str) -> Result<Mount, Invalid> {
    let mut kind = "volume";
    let (mut source, mut target, mut read_only) = (None, None, false);
    let mut options = Vec::new();
    for field in text.split(',') {
        let (key, value) = field.split_once('=').unwrap_or((field, ""));
        match key.to_ascii_lowercase().as_str() {
            "type" => kind = value,
            "source" | "src" => source = Some(value),
            "target" | "destination" | "dst" => target = Some(value),
            "readonly" | "ro" => {
                read_only = match value {
                    "" | "true" | "1" => true,
                    "false" | "0" => false,
                    _ => return Err(Invalid::new(format!("invalid value for {key}: {value}"))),
                }
            }
            "tmpfs-size" => options.push(format!("size={}", super::memory(value)?)),
            "tmpfs-mode" => options.push(format!("mode={value}")),
            _ => return Err(Invalid::new(format!("unknown field '{key}' in '{field}'"))),
        }
    }
    let target = container_path(target.ok_or_else(|| Invalid::new("target is required"))?)?;
    if kind != "tmpfs" && !options.is_empty() {
        return Err(Invalid::new("tmpfs options need type=tmpfs"));
    }
    let source = match (kind, source) {
        ("bind", Some(source)) if !source.starts_with('/') => {
            return Err(Invalid::new(
                "a bind mount's source must be an absolute path",
            ));
        }
        ("bind", Some(source)) if !Path::new(source).exists() => {
            return Err(Invalid::new(format!(
                "bind source path does not exist: {source}"
            )));
        }
        ("bind", Some(source)) => VolumeSource::Host(PathBuf::from(source)),
        ("bind", None) => return Err(Invalid::new("a bind mount needs a source")),
        ("volume", None) => VolumeSource::Anonymous,
        ("volume", Some(name)) => VolumeSource::Host(host_path(name, Path::new("/"))?),
        ("tmpfs", None) => {
            if read_only {
                options.push("ro".to_owned());
            }
            return Ok(Mount::Tmpfs(Tmpfs { target, options }));
        }
        ("tmpfs", Some(_)) => return Err(Invalid::new("a tmpfs has no source")),
        _ => return Err(Invalid::new(format!("unknown mount type '{kind}'"))),
    };
    Ok(Mount::Volume(Volume {
        source,
        target,
        read_only,
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn host(path: &str, target: &str, read_only: bool) -> Volume {
        Volume {
            source: VolumeSource::Host(path.into()),
            target: target.into(),
            read_only,
        }
    }

    fn read(text: &str) -> Result<Volume, Invalid> {
        volume(text, Path::new("/here"))
    }

    #[test]
    fn volumes_are_absolute_relative_or_anonymous() {
        assert_eq!(read("/a:/b"), Ok(host("/a", "/b", false)));
        assert_eq!(read("/a:/b:ro,z"), Ok(host("/a", "/b", true)));
        assert_eq!(read("./a:/b:rw"), Ok(host("/here/./a", "/b", false)));
        assert_eq!(read(".:/b"), Ok(host("/here/.", "/b", false)));
        assert_eq!(read("/data").unwrap().source, VolumeSource::Anonymous);
    }

    #[test]
    fn what_is_no_volume_is_refused() {
        for text in [
            "",
            ":/b",
            "/a:",
            "/a:b",
            "/a:/",
            "/a:/b:shiny",
            "/a:/b:ro:x",
            "name:/b",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
        let message = read("cache:/b").unwrap_err().to_string();
        assert!(
            message.contains("named volume") && message.contains("./cache"),
            "{message}"
        );
    }

    #[test]
    fn mounts_say_their_type() {
        assert_eq!(
            mount("type=bind,source=/tmp,target=/b,readonly"),
            Ok(Mount::Volume(host("/tmp", "/b", true)))
        );
        assert_eq!(
            mount("type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=1777"),
            Ok(Mount::Tmpfs(Tmpfs {
                target: "/t".into(),
                options: vec!["size=1048576".into(), "mode=1777".into()]
            }))
        );
        for text in [
            "",
            "type=bind,target=/b",
            "type=bind,source=/nonexistent,target=/b",
            "type=bind,source=x,target=/b",
            "type=tmpfs,source=/x,target=/b",
            "type=nfs,target=/b",
            "type=bind,source=/tmp",
            "type=bind,source=/tmp,target=/b,color=red",
            "type=bind,source=/tmp,target=/b,tmpfs-size=1m",
        ] {
            assert!(mount(text).is_err(), "{text}");
        }
    }

    #[test]
    fn tmpfs_has_options_after_the_colon() {
        assert_eq!(
            tmpfs("/run:rw,size=64m"),
            Ok(Tmpfs {
                target: "/run".into(),
                options: vec!["rw".into(), "size=64m".into()]
            })
        );
        assert_eq!(tmpfs("/run").unwrap().options, Vec::<String>::new());
        assert!(tmpfs("run").is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_a_mount_or_refused(text in ".{0,60}") {
            let _ = (read(&text), mount(&text), tmpfs(&text));
        }
    }
}
