//! Where Hull keeps things on this host and what it assumes when nobody says otherwise.
//!
//! Owns: the settings file, its environment overrides, the search for Hull's own parts beside
//! the running executable. Refuses: keys it doesn't know, and making any directory.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Everything a host's owner can decide.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Settings {
    /// Images, containers, templates: what survives a reboot.
    pub state_dir: PathBuf,
    /// Control sockets: what does not.
    pub run_dir: PathBuf,
    /// Hull's own parts.
    pub assets: Assets,
    /// What a request gets that doesn't say.
    pub defaults: Defaults,
    /// How registries are spoken to.
    pub registries: Registries,
    /// The hypervisor's device.
    pub kvm: PathBuf,
    /// Starts VMs where the hypervisor's device emulates a guest's kernel, however slowly.
    pub allow_emulated_kvm: bool,
    /// Starts are copied from templates, unless one is asked to boot.
    pub templates: bool,
}

/// Hull's own parts on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Assets {
    /// The monitor's executable.
    pub monitor: PathBuf,
    /// The guest kernel, an uncompressed ELF image.
    pub kernel: PathBuf,
    /// The guest kernel made for debugging.
    pub kernel_debug: PathBuf,
    /// The guest's first root, which holds the agent.
    pub initrd: PathBuf,
}

/// What a request gets that doesn't say.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Processors.
    pub cpus: f64,
    /// Size in bytes of the disk that holds what a container writes over its image.
    pub scratch_bytes: u64,
    /// Seconds between a stop signal and SIGKILL.
    pub stop_timeout_s: u32,
    /// Bytes that a container's log may take before its oldest half is dropped.
    pub log_limit_bytes: u64,
    /// Seconds that a guest may take from its first instruction to its agent's word.
    pub boot_timeout_s: u32,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            memory_bytes: 512 << 20,
            cpus: 1.0,
            scratch_bytes: 10 << 30,
            stop_timeout_s: 10,
            log_limit_bytes: 64 << 20,
            boot_timeout_s: 60,
        }
    }
}

/// How registries are spoken to. Hull's engine only carries this to the faces.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Registries {
    /// Hosts (with port) that are spoken to in plain HTTP, beside loopback.
    pub plain_http: Vec<String>,
}

/// The settings file as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct SettingsFile {
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    kvm: Option<PathBuf>,
    allow_emulated_kvm: bool,
    templates: Option<bool>,
    assets: AssetsFile,
    defaults: Defaults,
    registries: Registries,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct AssetsFile {
    monitor: Option<PathBuf>,
    kernel: Option<PathBuf>,
    kernel_debug: Option<PathBuf>,
    initrd: Option<PathBuf>,
}

/// Settings that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The settings file exists and can't be read.
    #[error("cannot read settings \"{path}\"")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The settings file isn't TOML of the known shape.
    #[error("settings \"{path}\" are not valid")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<toml::de::Error>,
    },
    /// The running executable can't be named, so its neighbours can't either.
    #[error("cannot tell where the running executable lies")]
    Executable(#[source] io::Error),
    /// No directory is known for a user without root's rights.
    #[error("neither {variable} nor HOME is set, so there is no place for Hull's files")]
    NoHome {
        /// The variable that would have decided.
        variable: &'static str,
    },
}

impl Settings {
    /// Reads the settings of whoever runs this process: `HULL_CONFIG`, or
    /// `/etc/hull/config.toml`, or `$XDG_CONFIG_HOME/hull/config.toml` without root's rights;
    /// then `HULL_STATE_DIR` and `HULL_RUN_DIR`.
    ///
    /// # Errors
    /// If a file was named and isn't there, or one is there and can't be understood.
    pub fn load() -> Result<Self, SettingsError> {
        let rootless = !rustix::process::geteuid().is_root();
        let file = match env::var_os("HULL_CONFIG") {
            Some(path) => read(Path::new(&path), true)?,
            None if rootless => match user_dir("XDG_CONFIG_HOME", ".config") {
                Ok(directory) => read(&directory.join("hull/config.toml"), false)?,
                Err(_) => SettingsFile::default(),
            },
            None => read(Path::new("/etc/hull/config.toml"), false)?,
        };
        let state_dir = match env::var_os("HULL_STATE_DIR").map(PathBuf::from) {
            Some(path) => path,
            None => match file.state_dir.clone() {
                Some(path) => path,
                None if rootless => user_dir("XDG_DATA_HOME", ".local/share")?.join("hull"),
                None => PathBuf::from("/var/lib/hull"),
            },
        };
        let run_dir = match env::var_os("HULL_RUN_DIR").map(PathBuf::from) {
            Some(path) => path,
            None => match file.run_dir.clone() {
                Some(path) => path,
                None if rootless => user_dir("XDG_RUNTIME_DIR", ".local/run")?.join("hull"),
                None => PathBuf::from("/run/hull"),
            },
        };
        let executable = env::current_exe().map_err(SettingsError::Executable)?;
        Ok(Self::assemble(file, state_dir, run_dir, &executable))
    }

    fn assemble(
        file: SettingsFile,
        state_dir: PathBuf,
        run_dir: PathBuf,
        executable: &Path,
    ) -> Self {
        let library = executable
            .parent()
            .and_then(Path::parent)
            .unwrap_or(Path::new("/usr"))
            .join("lib/hull");
        let asset =
            |asked: Option<PathBuf>, name: &str| asked.unwrap_or_else(|| library.join(name));
        Self {
            state_dir,
            run_dir,
            assets: Assets {
                monitor: asset(file.assets.monitor, "hull-monitor"),
                kernel: asset(file.assets.kernel, "vmlinux"),
                kernel_debug: asset(file.assets.kernel_debug, "vmlinux-debug"),
                initrd: asset(file.assets.initrd, "initrd"),
            },
            defaults: file.defaults,
            registries: file.registries,
            allow_emulated_kvm: file.allow_emulated_kvm,
            templates: file.templates.unwrap_or(true),
            kvm: file.kvm.unwrap_or_else(|| PathBuf::from("/dev/kvm")),
        }
    }
}

fn read(path: &Path, required: bool) -> Result<SettingsFile, SettingsError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !required => {
            return Ok(SettingsFile::default());
        }
        Err(source) => {
            return Err(SettingsError::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    toml::from_str(&text).map_err(|source| SettingsError::Parse {
        path: path.to_owned(),
        source: Box::new(source),
    })
}

fn user_dir(variable: &'static str, below_home: &str) -> Result<PathBuf, SettingsError> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    match (set(variable), set("HOME")) {
        (Some(directory), _) => Ok(PathBuf::from(directory)),
        (None, Some(home)) => Ok(Path::new(&home).join(below_home)),
        (None, None) => Err(SettingsError::NoHome { variable }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assemble(text: &str) -> Settings {
        Settings::assemble(
            toml::from_str(text).unwrap(),
            "/s".into(),
            "/r".into(),
            Path::new("/opt/hull/bin/hull"),
        )
    }

    #[test]
    fn parts_lie_beside_the_executable_unless_said() {
        let settings = assemble("[assets]\nkernel = \"/boot/vmlinux\"\n");
        assert_eq!(settings.assets.kernel, Path::new("/boot/vmlinux"));
        assert_eq!(
            settings.assets.monitor,
            Path::new("/opt/hull/lib/hull/hull-monitor")
        );
        assert_eq!(settings.defaults, Defaults::default());
    }

    #[test]
    fn one_default_can_change_alone() {
        let settings = assemble("[defaults]\nmemory_bytes = 1073741824\n");
        assert_eq!(settings.defaults.memory_bytes, 1 << 30);
        assert_eq!(settings.defaults.stop_timeout_s, 10);
    }

    #[test]
    fn an_unknown_key_is_refused() {
        assert!(toml::from_str::<SettingsFile>("memory = 1").is_err());
        assert!(toml::from_str::<SettingsFile>("[defaults]\nmem = 1").is_err());
    }

    #[test]
    fn a_named_file_must_exist() {
        let missing = Path::new("/nonexistent/hull.toml");
        assert!(matches!(
            read(missing, true),
            Err(SettingsError::Read { .. })
        ));
        assert!(read(missing, false).is_ok());
    }
}
