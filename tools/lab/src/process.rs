//! Other programs: run to the end, or kept until they are stopped; none outlives this one.
//! Must not know what they do.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
use nix::unistd::Pid;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
const POLL: Duration = Duration::from_millis(20);

/// From now on SIGINT, SIGTERM and SIGHUP end the run in good order instead of at once.
///
/// # Errors
/// When the system refuses.
pub fn catch_signals() -> Result<()> {
    extern "C" fn note(_: i32) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    let action = SigAction::new(SigHandler::Handler(note), SaFlags::SA_RESTART, SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler does nothing but set an atomic.
        unsafe { signal::sigaction(signal, &action) }.context("cannot catch signals")?;
    }
    Ok(())
}

/// Fails once a signal has come. Every loop that waits calls this.
///
/// # Errors
/// `interrupted`.
pub fn check_interrupt() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(anyhow!("interrupted")) } else { Ok(()) }
}

/// A program without a terminal, and without the variables by which a user's own daemon is configured.
pub fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).env("LC_ALL", "C.UTF-8");
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("BLOCKFERRY_") {
            command.env_remove(name);
        }
    }
    command
}

/// Runs to the end; what it said on stdout. `seen` lets its stderr through to the user.
///
/// # Errors
/// When it cannot be started or fails, with the end of what it said on stderr.
pub fn output(command: &mut Command, seen: bool) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let stderr = if seen { Stdio::inherit() } else { Stdio::piped() };
    let child = command.stdout(Stdio::piped()).stderr(stderr).spawn();
    let mut child = child.with_context(|| format!("cannot start {name}"))?;
    let out = child.stdout.take().map(drain);
    let err = child.stderr.take().map(drain);
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("cannot wait for {name}"))? {
            break status;
        }
        if let Err(interrupted) = check_interrupt() {
            let _ = child.kill();
            let _ = child.wait();
            return Err(interrupted);
        }
        thread::sleep(POLL);
    };
    let text = |reader: Option<thread::JoinHandle<Vec<u8>>>| {
        let bytes = reader.and_then(|reader| reader.join().ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let (out, err) = (text(out), text(err));
    if status.success() {
        return Ok(out);
    }
    let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
    bail!("{name} {} failed ({status})\n{}{}", args.join(" "), tail(&out), tail(&err))
}

/// What a command came to.
#[derive(Debug)]
pub struct Said {
    /// Whether it succeeded.
    pub is_done: bool,
    /// On stdout.
    pub out: String,
    /// On stderr.
    pub err: String,
}

/// Runs to the end, whatever that is; `None`: it had not ended after `patience`, and was killed.
///
/// # Errors
/// When it cannot be started or waited for, or somebody interrupts.
pub fn said(command: &mut Command, patience: Duration) -> Result<Option<Said>> {
    let name = command.get_program().to_string_lossy().into_owned();
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let mut asked = Asked { child: child.with_context(|| format!("cannot start {name}"))? };
    let out = asked.child.stdout.take().map(drain);
    let err = asked.child.stderr.take().map(drain);
    let Some(is_done) = asked.ends_within(patience)? else { return Ok(None) };
    let text = |reader: Option<thread::JoinHandle<Vec<u8>>>| {
        let bytes = reader.and_then(|reader| reader.join().ok()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    Ok(Some(Said { is_done, out: text(out), err: text(err) }))
}

/// A command under way.
#[derive(Debug)]
pub struct Asked {
    child: Child,
}

impl Asked {
    /// Starts it; what it says is not looked at.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Asked> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Ok(Asked { child: child.with_context(|| format!("cannot start {name}"))? })
    }

    /// Waits for its end, but no longer than this; whether it succeeded.
    ///
    /// # Errors
    /// When it cannot be waited for, or somebody interrupts.
    pub fn finish(mut self, patience: Duration) -> Result<bool> {
        Ok(self.ends_within(patience)?.unwrap_or(false))
    }

    fn ends_within(&mut self, patience: Duration) -> Result<Option<bool>> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().context("cannot wait for a command")? {
                return Ok(Some(status.success()));
            }
            check_interrupt()?;
            thread::sleep(POLL);
        }
        Ok(None)
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        // Both fail when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn drain(mut from: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // A broken pipe ends what it said.
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

/// A program that runs until [`Daemon::stop`], or until this is dropped.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    lines: Receiver<String>,
    log: PathBuf,
}

impl Daemon {
    /// Starts it, its stderr in `log`. A signal for this process group does not reach it, so that it is stopped in order;
    /// it is killed should this process be. Call from the main thread: the system means the thread's death.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Daemon> {
        let stderr = File::options().create(true).append(true).open(log);
        let stderr = stderr.with_context(|| format!("cannot write {}", log.display()))?;
        command.stdout(Stdio::piped()).stderr(stderr).process_group(0);
        // SAFETY: prctl is all that happens between fork and exec; it allocates nothing and takes no lock.
        unsafe { command.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)) };
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let (sender, lines) = mpsc::channel();
        if let Some(stdout) = child.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    // Nobody may be interested any more, but the pipe has to stay empty.
                    let _ = sender.send(line);
                }
            });
        }
        Ok(Daemon { name: name.to_owned(), child, lines, log: log.to_owned() })
    }

    /// Waits for its line `ready KEY=VALUE ...` and gives the value of `key`.
    ///
    /// # Errors
    /// When it ends or says nothing within a minute; with the end of its log.
    pub fn ready(&mut self, key: &str) -> Result<String> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            check_interrupt()?;
            match self.lines.recv_timeout(POLL) {
                Ok(line) if line.starts_with("ready ") => {
                    let mut words = line.split(' ').filter_map(|word| word.split_once('='));
                    let value = words.find(|(name, _)| *name == key).map(|(_, value)| value.to_owned());
                    return value.ok_or_else(|| anyhow!("{}: no {key}= in `{line}`", self.name));
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(_) => bail!("{} did not get ready\n{}", self.name, self.log_tail()),
            }
        }
    }

    /// Fails when it has ended by itself.
    ///
    /// # Errors
    /// With the end of its log.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait().with_context(|| format!("cannot look at {}", self.name))? {
            None => Ok(()),
            Some(status) => bail!("{} has ended by itself ({status})\n{}", self.name, self.log_tail()),
        }
    }

    /// The most memory that it has had.
    pub fn peak_memory_bytes(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
        line.split_ascii_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
    }

    /// SIGKILL, and its end awaited.
    ///
    /// # Errors
    /// When it had ended by itself before.
    pub fn kill(mut self) -> Result<()> {
        self.check()?;
        self.child.kill().with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait().map(drop).with_context(|| format!("cannot wait for {}", self.name))
    }

    /// SIGTERM, and its end awaited.
    ///
    /// # Errors
    /// When it takes more than a minute, or does not end with status 0.
    pub fn stop(mut self) -> Result<()> {
        self.check()?;
        let deadline = Instant::now() + Duration::from_secs(60);
        signal::kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM)
            .with_context(|| format!("cannot stop {}", self.name))?;
        loop {
            match self.child.try_wait().with_context(|| format!("cannot wait for {}", self.name))? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => bail!("{} ended with {status} after SIGTERM\n{}", self.name, self.log_tail()),
                None if Instant::now() > deadline => {
                    bail!("{} did not end within a minute of SIGTERM\n{}", self.name, self.log_tail())
                }
                None => thread::sleep(POLL),
            }
        }
    }

    fn log_tail(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        format!("the end of its log:\n{}", tail(&String::from_utf8_lossy(&log)))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail when it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].iter().map(|line| format!("  {line}\n")).collect()
}
