//! The warm machine: started once, found again by every later caller.
//!
//! Owns: `target/host/run/NAME`: `lock` (held while deciding), `users` (held shared by callers),
//! `alive` (held by QEMU and its keeper), `state.json`, the logs. Refuses: to trust a process id
//! where a lock can tell.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::image::Image;
use super::initramfs::Archive;
use super::kernel::Kernel;
use super::qemu::{self, Shape};
use super::report::Report;
use super::wire::Boot;

/// A machine that nobody uses ends after this long.
const IDLE: Duration = Duration::from_secs(30 * 60);
/// A boot takes 4 to 6 s; a loaded outer machine may need far more.
const BOOT_DEADLINE: Duration = Duration::from_secs(180);

/// What a machine is started from.
pub(super) struct Plan<'a> {
    pub(super) name: &'a str,
    pub(super) icount: bool,
    pub(super) memory: u32,
    pub(super) kernel: &'a Kernel,
    pub(super) image: &'a Image,
}

/// What `state.json` tells the next caller.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct State {
    /// Equal to the next plan's, or a new machine is started.
    identity: String,
    pub(super) port: u16,
    pub(super) token: String,
}

/// A use of a running machine. Dropping it lets the machine go idle.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) state: State,
    pub(super) directory: PathBuf,
    pub(super) icount: bool,
    users: File,
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Best effort: a machine that is gone needs neither.
        let _touched = self.users.set_modified(SystemTime::now());
        if self.icount {
            // Its time jumps from timer to timer when nothing runs, and would burn a processor.
            let _frozen = qemu::tell(&self.directory, "stop");
        }
    }
}

/// Finds the machine of this plan or starts it.
///
/// # Errors
/// When it can't be started; its console's last lines are part of the error.
pub(super) fn lease(runs: &Path, plan: &Plan<'_>, fresh: bool, report: &Report) -> Result<Lease> {
    let directory = runs.join(plan.name);
    fs::create_dir_all(&directory).with_context(|| format!("make {}", directory.display()))?;
    let _deciding = locked(&directory, "lock")?;
    let users = lock_file(&directory, "users")?;
    let server = qemu::file_server()?;
    let identity = identity(plan, &server);
    let found = if is_alive(&directory)? {
        read_state(&directory).ok()
    } else {
        None
    };
    let state = match found {
        Some(state) if !fresh && state.identity == identity => state,
        _ => {
            if is_alive(&directory)? {
                if users.try_lock().is_err() {
                    report.step("waiting for the old machine's commands to end");
                    users.lock().context("wait for the machine's users")?;
                }
                users.unlock()?;
                stop(&directory)?;
            }
            start(&directory, plan, identity, &server, report)?
        }
    };
    if plan.icount {
        // One command at a time, or none has a time of its own.
        users.lock().context("wait for the machine")?;
        qemu::tell(&directory, "cont")?;
    } else {
        users.lock_shared().context("enter the machine")?;
    }
    users.set_modified(SystemTime::now())?;
    Ok(Lease {
        state,
        directory,
        icount: plan.icount,
        users,
    })
}

/// Ends the machine of that name, its commands too. True if there was one.
///
/// # Errors
/// When it can't be ended.
pub(super) fn end(runs: &Path, name: &str) -> Result<bool> {
    let directory = runs.join(name);
    if !directory.is_dir() {
        return Ok(false);
    }
    let _deciding = locked(&directory, "lock")?;
    let alive = is_alive(&directory)?;
    if alive {
        stop(&directory)?;
    }
    Ok(alive)
}

/// Ends a machine that doesn't answer any more and returns what it was at.
pub(super) fn end_hung(directory: &Path) -> String {
    let state = qemu::registers(directory).unwrap_or_else(|error| format!("{error:#}"));
    let words = last_words(directory);
    if let Err(error) = locked(directory, "lock").and_then(|_deciding| stop(directory)) {
        return format!("{state}{words}\n  and it couldn't be ended: {error:#}");
    }
    format!("{state}{words}")
}

/// The last lines that the machine's kernel and QEMU wrote.
pub(super) fn last_words(directory: &Path) -> String {
    let mut words = String::new();
    for log in ["qemu.log", "console.log"] {
        let text = fs::read(directory.join(log)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(12)..] {
            words.push_str("\n  ");
            words.push_str(line.trim_end());
        }
    }
    words
}

fn identity(plan: &Plan<'_>, server: &[String]) -> String {
    // Port 0: the port is the machine's, not the plan's.
    let arguments = qemu::arguments(&shape(plan, 0));
    let qemu = super::packages::find(qemu::PROGRAM).unwrap_or_default();
    let changed = fs::metadata(&qemu).and_then(|data| data.modified());
    let init = plan.image.init.display();
    let (arguments, server) = (arguments.join(" "), server.join(" "));
    format!("{changed:?} {init} {arguments} {server}")
}

fn shape<'a>(plan: &Plan<'a>, port: u16) -> Shape<'a> {
    Shape {
        icount: plan.icount,
        memory: plan.memory,
        kernel: &plan.kernel.image,
        port,
    }
}

fn lock_file(directory: &Path, name: &str) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(directory.join(name))
        .with_context(|| format!("open {} in {}", name, directory.display()))
}

fn locked(directory: &Path, name: &str) -> Result<File> {
    let file = lock_file(directory, name)?;
    file.lock().with_context(|| format!("lock {name}"))?;
    Ok(file)
}

fn is_alive(directory: &Path) -> Result<bool> {
    match lock_file(directory, "alive")?.try_lock() {
        Ok(()) => Ok(false),
        Err(fs::TryLockError::WouldBlock) => Ok(true),
        Err(fs::TryLockError::Error(error)) => Err(error).context("look at the machine's lock"),
    }
}

fn read_state(directory: &Path) -> Result<State> {
    Ok(serde_json::from_slice(&fs::read(
        directory.join("state.json"),
    )?)?)
}

fn stop(directory: &Path) -> Result<()> {
    if let Err(error) = qemu::tell(directory, "quit") {
        // It hangs or starts: the lock says that the recorded process is QEMU.
        let pid = fs::read_to_string(directory.join("pid")).context("read QEMU's process id")?;
        let pid = rustix::process::Pid::from_raw(pid.trim().parse()?).context("process id 0")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)
            .with_context(|| format!("kill QEMU, as it didn't listen ({error:#})"))?;
    }
    let alive = lock_file(directory, "alive")?;
    alive.lock().context("wait for QEMU's end")
}

fn start(
    directory: &Path,
    plan: &Plan<'_>,
    identity: String,
    server: &[String],
    report: &Report,
) -> Result<State> {
    let kind = if plan.icount {
        ", deterministic time"
    } else {
        ""
    };
    report.step(&format!(
        "starting the emulated KVM host (Linux {}, {} MiB{kind})",
        plan.kernel.release, plan.memory
    ));
    for stale in ["state.json", "pid", "console.log", "qemu.log"] {
        let _absent = fs::remove_file(directory.join(stale));
    }
    let state = State {
        identity,
        port: free_port()?,
        token: token()?,
    };
    write_initrd(directory, plan, &state)?;
    let mut keeper = Command::new(&plan.image.init)
        .arg("supervise")
        .arg(directory)
        .arg(IDLE.as_secs().to_string())
        .args(server)
        .args(["--", qemu::PROGRAM])
        .args(qemu::arguments(&shape(plan, state.port)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(File::create(directory.join("qemu.log"))?)
        .spawn()
        .with_context(|| format!("start {}", plan.image.init.display()))?;
    if let Err(error) = await_ready(&mut keeper) {
        let words = last_words(directory);
        let _ended = qemu::tell(directory, "quit");
        let _killed = keeper.kill();
        let _reaped = keeper.wait();
        return Err(error.context(format!("the emulated KVM host didn't start:{words}")));
    }
    let text = serde_json::to_vec(&state)?;
    private_file(&directory.join("state.json"), &text)?;
    Ok(state)
}

/// Waits for the machine's one line. The keeper then lives on by itself.
fn await_ready(keeper: &mut Child) -> Result<()> {
    let stdout = keeper.stdout.take().context("the keeper has no stdout")?;
    let deadline = Instant::now() + BOOT_DEADLINE;
    let mut lines = BufReader::new(Deadlined { stdout, deadline });
    let mut line = String::new();
    // SeaBIOS and the kernel say nothing here: the first line is the init's.
    lines.read_line(&mut line).context("wait for it")?;
    match line.trim() {
        "ready" => Ok(()),
        "" => bail!("QEMU ended"),
        other => bail!("its init says: {other}"),
    }
}

/// A pipe whose reads end at a deadline.
struct Deadlined {
    stdout: std::process::ChildStdout,
    deadline: Instant,
}

impl Read for Deadlined {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(std::io::Error::other)?;
        let mut watched = [PollFd::from_borrowed_fd(self.stdout.as_fd(), PollFlags::IN)];
        if poll(&mut watched, Some(&timeout))? == 0 {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        self.stdout.read(buffer)
    }
}

fn free_port() -> Result<u16> {
    let probe = TcpListener::bind("127.0.0.1:0").context("find a free port")?;
    Ok(probe.local_addr()?.port())
}

fn token() -> Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The image's initramfs with this machine's settings behind it.
fn write_initrd(directory: &Path, plan: &Plan<'_>, state: &State) -> Result<()> {
    let boot = Boot {
        token: state.token.clone(),
        hostname: format!("hull-host-{}", plan.name),
        kernel_dir: plan.kernel.dir.clone(),
        modules: plan.image.modules.clone(),
    };
    let mut settings = Archive::default();
    settings.file("boot.json", 0o600, &serde_json::to_vec(&boot)?)?;
    let mut initrd = fs::read(&plan.image.initramfs).context("read the initramfs")?;
    ensure!(initrd.len() % 4 == 0, "the initramfs is cut short");
    initrd.extend_from_slice(&settings.finish()?);
    private_file(&directory.join("initrd"), &initrd)
}

fn private_file(path: &Path, content: &[u8]) -> Result<()> {
    let _absent = fs::remove_file(path);
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(content))
        .with_context(|| format!("write {}", path.display()))
}
