//! What `docker inspect` would say of a container, and under `Hull` what only a micro-VM has.

use std::path::Path;

use hull_sandbox::{Export, ExportSource, Plan, PlannedRoot, Status, signal_name};
use serde_json::{Value, json};

/// What Docker writes for a time that hasn't come.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// The whole object. `monitor` is what a live monitor says of itself, `directory` where the
/// container's files lie.
pub(super) fn describe(plan: &Plan, status: &Status, monitor: &Value, directory: &Value) -> Value {
    let command = plan.command();
    // What is JSON can be read as that.
    let spec: Value = plan.spec.read().unwrap_or_default();
    json!({
        "Id": plan.id,
        "Created": plan.created_at.to_string(),
        "Path": command.first(),
        "Args": command.get(1..).unwrap_or_default(),
        "State": state(status),
        "Image": plan.image.as_ref().map(|image| &image.id),
        "Name": format!("/{}", plan.name),
        "HostConfig": host_config(plan, &spec),
        "Mounts": mounts(plan, &spec),
        "Config": config(plan, &spec),
        "NetworkSettings": { "Networks": {} },
        "Hull": hull(plan, status, monitor, directory),
    })
}

fn state(status: &Status) -> Value {
    let (word, pid) = match status {
        Status::Created => ("created", 0),
        Status::Starting => ("starting", 0),
        Status::Running(running) => ("running", running.monitor_pid),
        Status::Exited(_) => ("exited", 0),
    };
    let exit = match status {
        Status::Exited(exit) => Some(exit),
        _ => None,
    };
    let started = match status {
        Status::Running(running) => Some(running.started_at),
        _ => exit.and_then(|exit| exit.started_at),
    };
    let time = |time: Option<jiff::Timestamp>| time.map_or_else(|| NEVER.into(), |t| t.to_string());
    json!({
        "Status": word,
        "Running": matches!(status, Status::Running(_)),
        "Paused": false,
        "Restarting": false,
        "OOMKilled": exit.is_some_and(|exit| exit.oom),
        "Dead": false,
        "Pid": pid,
        "ExitCode": exit.map_or(0, |exit| exit.code),
        "Error": exit.and_then(|exit| exit.error.as_deref()).unwrap_or_default(),
        "StartedAt": time(started),
        "FinishedAt": time(exit.map(|exit| exit.finished_at)),
    })
}

fn host_config(plan: &Plan, spec: &Value) -> Value {
    let changed = changed(plan);
    let quota = (changed["cpu"]["quota"].as_f64()).zip(changed["cpu"]["period"].as_f64());
    let cpus = match quota {
        Some((quota, period)) if quota > 0.0 && period > 0.0 => Some(quota / period),
        Some(_) => None,
        None => plan.vm.cpu_quota,
    };
    let cpus = cpus.unwrap_or_else(|| f64::from(plan.vm.vcpus));
    let memory = changed["memory"]["limit"].as_u64();
    let or_zero = |value: &Value| value.as_i64().unwrap_or_default();
    json!({
        "AutoRemove": plan.auto_remove,
        "Binds": binds(plan, spec),
        "CpuShares": or_zero(&changed["cpu"]["shares"]),
        "CpusetCpus": changed["cpuset.cpus"].as_str().unwrap_or_default(),
        "CpusetMems": changed["cpuset.mems"].as_str().unwrap_or_default(),
        "Init": plan.init,
        "Memory": memory.unwrap_or(plan.vm.memory_bytes),
        "MemoryReservation": or_zero(&changed["memory"]["reservation"]),
        // At most 32 processors, so far inside what both number types hold.
        "NanoCpus": (cpus * 1e9).round() as u64,
        "PidsLimit": changed["pids"]["limit"].as_i64(),
        "NetworkMode": network_mode(plan),
        "ReadonlyRootfs": spec["root"]["readonly"].as_bool().unwrap_or_default(),
        "Runtime": "hull",
    })
}

/// Limits that were changed since it was made: the guest's as the OCI runtime specification has
/// them, and the files of the host's.
fn changed(plan: &Plan) -> Value {
    let Some(limits) = &plan.limits else {
        return Value::Null;
    };
    let mut all = json!(limits.guest);
    for (file, value) in &limits.host {
        all[file] = json!(value);
    }
    all
}

fn network_mode(plan: &Plan) -> String {
    match &plan.network {
        Some(path) => format!("ns:{}", path.display()),
        None => "none".to_owned(),
    }
}

fn config(plan: &Plan, spec: &Value) -> Value {
    let process = &spec["process"];
    let user = process.get("user");
    let user = user.map(|user| format!("{}:{}", user["uid"], user["gid"]));
    json!({
        "Hostname": plan.hostname,
        "User": user,
        "Tty": plan.tty,
        "OpenStdin": plan.interactive,
        "Env": process.get("env").unwrap_or(&json!([])),
        "Cmd": plan.command(),
        "Image": plan.image.as_ref().map(|image| &image.reference),
        "WorkingDir": process["cwd"],
        "Labels": plan.labels,
        "StopSignal": signal_name(plan.stop_signal),
        "StopTimeout": plan.stop_timeout_s,
    })
}

/// Volumes as `-v` would have them.
fn binds(plan: &Plan, spec: &Value) -> Vec<String> {
    let bind = |(export, target): (&Export, &Path)| {
        let source = source(export)?;
        let mode = if export.read_only { "ro" } else { "rw" };
        Some(format!("{source}:{}:{mode}", target.display()))
    };
    volumes(plan, spec).filter_map(bind).collect()
}

fn mounts(plan: &Plan, spec: &Value) -> Vec<Value> {
    let mount = |(export, target): (&Export, &Path)| {
        let source = source(export);
        json!({
            "Type": if source.is_some() { "bind" } else { "volume" },
            "Source": source.unwrap_or_default(),
            "Destination": target,
            "Mode": if export.read_only { "ro" } else { "" },
            "RW": !export.read_only,
        })
    };
    volumes(plan, spec).map(mount).collect()
}

/// The host's path, unless the volume is the container's own.
fn source(export: &Export) -> Option<String> {
    match &export.source {
        ExportSource::Directory(path) | ExportSource::File(path) => {
            Some(path.display().to_string())
        }
        ExportSource::Anonymous(_) | ExportSource::Identity => None,
    }
}

/// Exports that are volumes, each with its place in the container.
fn volumes<'a>(plan: &'a Plan, spec: &'a Value) -> impl Iterator<Item = (&'a Export, &'a Path)> {
    let mounts = spec["mounts"].as_array().map_or(&[][..], Vec::as_slice);
    let exports = plan.exports.iter();
    let exports = exports.filter(|export| !matches!(export.source, ExportSource::Identity));
    exports.filter_map(move |export| {
        let guest_path = Path::new(hull_proto::SHARES_DIR).join(&export.name);
        let is_its = |source: &str| Path::new(source).starts_with(&guest_path);
        let mount = mounts
            .iter()
            .find(|mount| mount["source"].as_str().is_some_and(is_its))?;
        Some((export, Path::new(mount["destination"].as_str()?)))
    })
}

fn hull(plan: &Plan, status: &Status, monitor: &Value, directory: &Value) -> Value {
    let running = match status {
        Status::Running(running) => Some(running),
        _ => None,
    };
    let root = match &plan.root {
        PlannedRoot::Layers(layers) => json!({ "Layers": layers }),
        PlannedRoot::Directory(path) => json!({ "Directory": path }),
    };
    json!({
        "Vcpus": plan.vm.vcpus,
        "CpuQuota": plan.vm.cpu_quota,
        "MemoryBytes": plan.vm.memory_bytes,
        "ScratchBytes": plan.vm.scratch.as_ref().map(|scratch| scratch.bytes),
        "Kernel": running.map(|running| &running.kernel),
        "KernelImage": plan.vm.kernel,
        "KernelCommandLine": plan.vm.cmdline,
        "Debug": plan.vm.debug,
        "MonitorPid": running.map(|running| running.monitor_pid),
        "GuestPid": running.map(|running| running.guest_pid),
        "AttachedClients": monitor["attached"],
        "Jail": monitor["jail"],
        "StartMarks": monitor["marks"],
        "ShareRequests": monitor["fs_requests"],
        "Interfaces": monitor["interfaces"],
        "Root": root,
        "StateDirectory": directory,
    })
}

#[cfg(test)]
mod tests;
