//! Containerd's calls about a sandbox (`containerd.runtime.sandbox.v1.Sandbox`), which come from
//! 1.7 on where a runtime's `sandboxer` is `"shim"`. Its events are containerd's own.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_sync::Sandbox as Calls;
use containerd_shim_protos::ttrpc::{self, Code, MethodHandler, Request, Response, get_status};
use ttrpc::proto::ResponseInit;
use ttrpc::{Result, TtrpcContext};

use crate::fault::{Answer, Fault};
use crate::metrics;
use crate::sandbox::Sandbox;
use crate::service::Service;

/// CRI's words (`PodSandboxState`), which containerd passes on.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// Calls of containerd's later versions that it can do without, if it is told so in their own code.
const LATER: [&str; 2] = ["UpdateSandbox", "PortForward"];

impl Service {
    fn known(&self, id: &str) -> Answer<Arc<Sandbox>> {
        let sandbox = self.sandbox().clone().filter(|sandbox| sandbox.id == id);
        sandbox.ok_or_else(|| Fault::NotFound(format!("sandbox {id}")))
    }
}

impl Calls for Service {
    fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        let mut place = self.sandbox();
        if place.is_some() {
            return Err(Fault::AlreadyExists(format!("sandbox {}", request.sandbox_id)).into());
        }
        if !request.rootfs.is_empty() {
            // What waits in it is the agent's own.
            return Err(Fault::Invalid("a sandbox's root file system".to_owned()).into());
        }
        *place = Some(Sandbox::create(&self.around, &request)?);
        Ok(CreateSandboxResponse::default())
    }

    fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        let sandbox = self.known(&request.sandbox_id)?;
        sandbox.start()?;
        Ok(StartSandboxResponse {
            pid: sandbox.pid,
            created_at: MessageField::some(sandbox.created_at.into()),
            ..StartSandboxResponse::default()
        })
    }

    fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> Result<PlatformResponse> {
        self.known(&request.sandbox_id)?;
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        "linux".clone_into(&mut platform.os);
        "amd64".clone_into(&mut platform.architecture);
        Ok(response)
    }

    fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> Result<StopSandboxResponse> {
        let timeout = match request.timeout_secs {
            0 => None,
            seconds => Some(Duration::from_secs(seconds.into())),
        };
        self.known(&request.sandbox_id)?.stop(timeout)?;
        Ok(StopSandboxResponse::default())
    }

    fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> Result<WaitSandboxResponse> {
        let exit = self.known(&request.sandbox_id)?.until_ended();
        Ok(WaitSandboxResponse {
            exit_status: exit.code,
            exited_at: exit.timestamp(),
            ..WaitSandboxResponse::default()
        })
    }

    fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse> {
        let sandbox = self.known(&request.sandbox_id)?;
        let mut info = HashMap::new();
        if request.verbose {
            info.insert("hull".to_owned(), sandbox.describe()?);
        }
        let state = if sandbox.is_ready() { READY } else { NOT_READY };
        let exit = sandbox.exit();
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: sandbox.pid,
            state: state.to_owned(),
            info,
            created_at: MessageField::some(sandbox.created_at.into()),
            exited_at: exit.map_or_else(MessageField::none, |exit| exit.timestamp()),
            ..SandboxStatusResponse::default()
        })
    }

    fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        self.known(&request.sandbox_id)?.stats()?;
        Ok(PingResponse::default())
    }

    fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        _: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        let mut place = self.sandbox();
        if let Some(sandbox) = place.as_ref() {
            sandbox.remove(&self.around)?;
        }
        *place = None;
        drop(place);
        self.close();
        Ok(ShutdownSandboxResponse::default())
    }

    fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        let sandbox = self.known(&request.sandbox_id)?;
        let holder = sandbox.stats()?;
        // Those of containers that have just ended are nobody's any more.
        let others = self.all_tasks().into_iter();
        let others = others.filter_map(|task| task.stats().ok());
        let others: Vec<_> = others.collect();
        let total = metrics::total(&holder, &others, sandbox.memory_bytes());
        let mut response = SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = MessageField::some(SystemTime::now().into());
        metrics.id = request.sandbox_id;
        metrics.data = MessageField::some(metrics::of(&total, &sandbox.interfaces()?));
        Ok(response)
    }
}

/// Answers of calls that there are in containerd's later versions: of one that isn't known to it
/// at all, the server says that it makes no sense.
pub(crate) fn later() -> HashMap<String, Box<dyn MethodHandler + Send + Sync>> {
    let handler = |name| -> Box<dyn MethodHandler + Send + Sync> { Box::new(NotThere(name)) };
    let path = |name| format!("/containerd.runtime.sandbox.v1.Sandbox/{name}");
    LATER
        .into_iter()
        .map(|name| (path(name), handler(name)))
        .collect()
}

struct NotThere(&'static str);

impl MethodHandler for NotThere {
    fn handler(&self, context: TtrpcContext, _: Request) -> Result<()> {
        let words = Fault::NotImplemented(self.0).to_string();
        let status = get_status(Code::UNIMPLEMENTED, words);
        context.respond(context.mh.stream_id, Response::init_status(status))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use containerd_shim_protos::protobuf::well_known_types::any::Any;
    use containerd_shim_protos::sandbox_sync::SandboxClient;
    use containerd_shim_protos::{Client, TaskClient, api};
    use hull_sandbox::{Engine, Settings};
    use ttrpc::{Error, Server, context};

    use super::*;
    use crate::events::Events;
    use crate::serve::{answer_and_leave, with_services};
    use crate::task::Surroundings;

    fn code<T: std::fmt::Debug>(answer: Result<T>) -> Code {
        match answer.unwrap_err() {
            Error::RpcStatus(status) => status.code(),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn calls_are_answered_to_the_last() {
        let directory = tempfile::tempdir().unwrap();
        let service = Arc::new(Service::new(Surroundings {
            engine: Engine::at(Settings::load().unwrap(), directory.path()),
            namespace: "ns".to_owned(),
            events: Events::start("ns", Box::new(|_| Ok(()))).unwrap(),
        }));
        let address = format!("unix://{}", directory.path().join("s").display());
        let mut server = with_services(Server::new().bind(&address).unwrap(), &service);
        server.start().unwrap();
        let serving = thread::spawn(move || {
            service.until_shut_down();
            let server = server.stop_listen();
            service.has_gone();
            answer_and_leave(server);
        });
        let client = Client::connect(&address).unwrap();
        let calls = SandboxClient::new(client.clone());
        let with = || context::with_timeout(60 << 30);

        let status = SandboxStatusRequest::default();
        assert_eq!(code(calls.sandbox_status(with(), &status)), Code::NOT_FOUND);
        let options = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            ..Any::default()
        };
        let create = CreateSandboxRequest {
            options: MessageField::some(options),
            ..CreateSandboxRequest::default()
        };
        let refused = calls.create_sandbox(with(), &create);
        assert_eq!(code(refused), Code::INVALID_ARGUMENT);
        for name in LATER {
            let request = Request {
                service: "containerd.runtime.sandbox.v1.Sandbox".to_owned(),
                method: name.to_owned(),
                ..Request::default()
            };
            assert_eq!(code(client.request(request)), Code::UNIMPLEMENTED);
        }
        let tasks = TaskClient::new(client);
        let connect = api::ConnectRequest::default();
        assert_eq!(tasks.connect(with(), &connect).unwrap().task_pid, 0);
        // It ends by this, and says so.
        let shutdown = ShutdownSandboxRequest::default();
        calls.shutdown_sandbox(with(), &shutdown).unwrap();
        serving.join().unwrap();
    }
}
