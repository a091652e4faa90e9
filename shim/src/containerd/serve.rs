//! The shim itself: listens until containerd has no more use for it.

use std::env;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use containerd_shim_protos::sandbox_sync::{Sandbox, create_sandbox};
use containerd_shim_protos::ttrpc::Server;
use containerd_shim_protos::{Task, create_task};

use crate::args::Flags;
use crate::bootstrap::{ADDRESS_FILE, TTRPC_ADDRESS, socket};
use crate::events::{self, Events};
use crate::service::Service;
use crate::task::Surroundings;
use crate::{engine, logging, sandbox_service};

/// The service as containerd 2 calls it; its messages are those of version 2 (containerd 1.x),
/// byte by byte.
const VERSION_3: &str = "/containerd.task.v3.Task/";
const VERSION_2: &str = "/containerd.task.v2.Task/";

/// What the last events may take to reach containerd, which is there: it has just called.
const LAST_EVENTS: Duration = Duration::from_secs(5);

/// What the last answers may take, to whoever waits for them.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

/// Serves on the socket that stdin is.
pub(crate) fn serve(flags: &Flags) -> anyhow::Result<()> {
    let listener = io::stdin().as_fd().try_clone_to_owned();
    let listener = listener.context("cannot take the socket")?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?).context("cannot leave stdin")?;
    let bundle = env::current_dir().context("cannot tell the bundle")?;
    // Without a log it is silent, and works.
    let _ = logging::to_fifo(&bundle, &flags.namespace, &flags.id, flags.debug);
    let deliver = match env::var(TTRPC_ADDRESS) {
        Ok(address) if !address.is_empty() => events::to_socket(&address),
        _ => events::by_program(&flags.publish_binary, &flags.address),
    };
    let events = Events::start(&flags.namespace, deliver)?;
    let service = Arc::new(Service::new(Surroundings {
        engine: engine(&flags.namespace)?,
        namespace: flags.namespace.clone(),
        events: Arc::clone(&events),
    }));
    let server = Server::new().add_listener(listener.into_raw_fd())?;
    let mut server = with_services(server, &service);
    server.start().context("cannot serve")?;
    log::info!("serves container {}", flags.id);
    service.until_shut_down();
    let server = server.stop_listen();
    // Nobody else's meanwhile. What is left of it, `delete` gets.
    let _ = socket_of(&bundle, &socket(flags)).and_then(|path| unlink(&path));
    service.has_gone();
    events.close(LAST_EVENTS);
    answer_and_leave(server);
    Ok(())
}

/// Has a server answer all that containerd calls.
pub(crate) fn with_services(server: Server, service: &Arc<Service>) -> Server {
    let calls: Arc<dyn Task + Send + Sync> = Arc::<Service>::clone(service);
    let sandbox: Arc<dyn Sandbox + Send + Sync> = Arc::<Service>::clone(service);
    let version_2 = create_task(Arc::clone(&calls))
        .into_iter()
        .map(|(path, call)| (path.replace(VERSION_3, VERSION_2), call));
    server
        .register_service(version_2.collect())
        .register_service(create_task(calls))
        .register_service(create_sandbox(sandbox))
        .register_service(sandbox_service::later())
}

/// Lets calls that are being answered be answered, the one that ended all among them.
pub(crate) fn answer_and_leave(server: Server) {
    let (done, all) = mpsc::channel::<()>();
    let closing = thread::Builder::new().name("close".to_owned());
    let closing = closing.spawn(move || {
        server.disconnect();
        drop(done);
    });
    if closing.is_ok() {
        // Either way it's time.
        let _ = all.recv_timeout(LAST_ANSWERS);
    }
}

/// Removes the socket of a bundle's shim, unless the shim goes on for others of its pod;
/// `otherwise` is where it is if the shim that was to say so didn't come to it.
pub(crate) fn remove_socket(bundle: &Path, otherwise: &Path) -> io::Result<()> {
    let path = socket_of(bundle, otherwise)?;
    if UnixStream::connect(&path).is_ok() {
        return Ok(());
    }
    unlink(&path)
}

fn socket_of(bundle: &Path, otherwise: &Path) -> io::Result<PathBuf> {
    match fs::read_to_string(bundle.join(ADDRESS_FILE)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(otherwise.to_owned()),
        address => Ok(PathBuf::from(address?.trim().trim_start_matches("unix://"))),
    }
}

fn unlink(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}
