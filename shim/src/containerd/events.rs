//! Events on their way to containerd: one queue, one thread, nothing overtakes. While containerd
//! is away they wait for it.

use std::collections::VecDeque;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail, ensure};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::{Client, EventsClient, ttrpc};

/// What containerd may take for one event.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause after the first attempt that fails; the next is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often an event is offered to a containerd that is there and refuses it.
const REFUSALS: u32 = 5;

/// An attempt that failed.
#[derive(Debug)]
pub(crate) enum Undelivered {
    /// Nobody is there.
    Away(anyhow::Error),
    /// Somebody is, and refuses.
    Refused(anyhow::Error),
}

/// Where events go.
pub(crate) type Deliver = Box<dyn FnMut(&Envelope) -> Result<(), Undelivered> + Send>;

/// The queue.
#[derive(Debug)]
pub(crate) struct Events {
    namespace: String,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// The first is being delivered.
    waiting: VecDeque<Envelope>,
    closed: bool,
}

impl Events {
    /// Starts to deliver.
    pub(crate) fn start(namespace: &str, deliver: Deliver) -> anyhow::Result<Arc<Self>> {
        let events = Arc::new(Self {
            namespace: namespace.to_owned(),
            queue: Mutex::default(),
            changed: Condvar::new(),
        });
        let own = Arc::clone(&events);
        thread::Builder::new()
            .name("events".to_owned())
            .spawn(move || own.run(deliver))
            .context("cannot start a thread")?;
        Ok(events)
    }

    /// Queues an event; never waits.
    pub(crate) fn push<M: Message>(&self, topic: &str, event: &M) {
        // Nothing of these messages can fail to be written: no field is required.
        let value = event.write_to_bytes().unwrap_or_default();
        let envelope = Envelope {
            timestamp: MessageField::some(SystemTime::now().into()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any {
                type_url: format!("containerd.events.{}", M::NAME),
                value,
                ..Any::default()
            }),
            ..Envelope::default()
        };
        self.lock().waiting.push_back(envelope);
        self.changed.notify_all();
    }

    /// Waits until all are delivered, for at most this long, and ends.
    pub(crate) fn close(&self, limit: Duration) {
        let until = Instant::now() + limit;
        let mut queue = self.lock();
        while !queue.waiting.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            queue = self.pause(queue, left);
        }
        queue.closed = true;
        self.changed.notify_all();
    }

    fn run(&self, mut deliver: Deliver) {
        while let Some(envelope) = self.first() {
            let (mut pause, mut refusals) = (FIRST_PAUSE, 0);
            while let Err(error) = deliver(&envelope) {
                let topic = &envelope.topic;
                match error {
                    Undelivered::Refused(error) => {
                        refusals += 1;
                        log::warn!("containerd refuses event {topic}: {error:#}");
                    }
                    Undelivered::Away(error) if pause == FIRST_PAUSE => {
                        log::warn!("event {topic} waits for containerd: {error:#}");
                    }
                    Undelivered::Away(_) => {}
                }
                if refusals == REFUSALS || !self.stay(pause) {
                    break;
                }
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            self.lock().waiting.pop_front();
            self.changed.notify_all();
        }
    }

    fn first(&self) -> Option<Envelope> {
        let mut queue = self.lock();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(envelope) = queue.waiting.front() {
                return Some(envelope.clone());
            }
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Pauses; says whether to go on after.
    fn stay(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut queue = self.lock();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if queue.closed || left.is_zero() {
                return !queue.closed;
            }
            queue = self.pause(queue, left);
        }
    }

    fn pause<'a>(&self, queue: MutexGuard<'a, Queue>, limit: Duration) -> MutexGuard<'a, Queue> {
        let waited = self.changed.wait_timeout(queue, limit);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// To containerd's socket; the connection is made anew when it breaks.
pub(crate) fn to_socket(address: &str) -> Deliver {
    let address = match address.strip_prefix("unix://") {
        Some(_) => address.to_owned(),
        None => format!("unix://{address}"),
    };
    let mut client: Option<EventsClient> = None;
    Box::new(move |envelope| {
        let connected = match client.take() {
            Some(client) => client,
            None => {
                let connection = Client::connect(&address).map_err(away)?;
                EventsClient::new(connection)
            }
        };
        let request = ForwardRequest {
            envelope: MessageField::some(envelope.clone()),
            ..ForwardRequest::default()
        };
        let context = ttrpc::context::with_duration(PATIENCE);
        match connected.forward(context, &request) {
            Ok(_) => {
                client = Some(connected);
                Ok(())
            }
            Err(error @ ttrpc::Error::RpcStatus(_)) => {
                Err(Undelivered::Refused(anyhow::Error::from(error)))
            }
            Err(error) => Err(away(error)),
        }
    })
}

fn away(error: ttrpc::Error) -> Undelivered {
    Undelivered::Away(error.into())
}

/// By containerd's own program, for a containerd without that socket.
pub(crate) fn by_program(program: &str, address: &str) -> Deliver {
    let (program, address) = (program.to_owned(), address.to_owned());
    Box::new(move |envelope| publish(&program, &address, envelope).map_err(Undelivered::Away))
}

fn publish(program: &str, address: &str, envelope: &Envelope) -> anyhow::Result<()> {
    ensure!(
        !program.is_empty(),
        "neither a socket nor a program takes events"
    );
    let mut child = Command::new(program)
        .args(["--address", address, "publish"])
        .args(["--topic", &envelope.topic])
        .args(["--namespace", &envelope.namespace])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run \"{program}\""))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that doesn't read says so by its end.
        let _ = stdin.write_all(&envelope.event.write_to_bytes()?);
    }
    let status = child.wait()?;
    match status.success() {
        true => Ok(()),
        false => bail!("\"{program}\" ended with {status}"),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use containerd_shim_protos::events::task::{TaskExit, TaskStart};

    use super::*;

    #[test]
    fn events_wait_for_containerd_and_keep_their_order() {
        let (seen, heard) = mpsc::channel();
        let mut away = 2;
        let deliver: Deliver = Box::new(move |envelope| {
            if envelope.topic == "/tasks/start" && away > 0 {
                away -= 1;
                return Err(Undelivered::Away(anyhow::anyhow!("nobody there")));
            }
            if envelope.topic == "/tasks/bad" {
                return Err(Undelivered::Refused(anyhow::anyhow!("no such topic")));
            }
            seen.send((envelope.topic.clone(), envelope.event.type_url.clone()))
                .map_err(|error| Undelivered::Refused(error.into()))
        });
        let events = Events::start("ns", deliver).unwrap();
        events.push("/tasks/start", &TaskStart::default());
        events.push("/tasks/bad", &TaskStart::default());
        events.push("/tasks/exit", &TaskExit::default());
        events.close(Duration::from_secs(60));
        let topics: Vec<_> = heard.try_iter().collect();
        assert_eq!(
            topics,
            [
                (
                    "/tasks/start".to_owned(),
                    "containerd.events.TaskStart".to_owned()
                ),
                (
                    "/tasks/exit".to_owned(),
                    "containerd.events.TaskExit".to_owned()
                ),
            ]
        );
    }

    #[test]
    fn an_end_waits_no_longer_than_asked() {
        let deliver: Deliver =
            Box::new(|_| Err(Undelivered::Away(anyhow::anyhow!("nobody there"))));
        let events = Events::start("ns", deliver).unwrap();
        events.push("/tasks/exit", &TaskExit::default());
        events.close(Duration::from_millis(20));
        assert_eq!(events.lock().waiting.len(), 1);
    }
}
