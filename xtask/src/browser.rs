//! Chromium without a window, driven over its DevTools protocol: what a page really becomes,
//! and when it was painted.
//!
//! Commands and events are JSON with a zero byte between them, on two pipes that the browser
//! finds as its descriptors 3 and 4. No port, no driver program, no version to match.

use std::collections::VecDeque;
use std::io::{BufRead as _, BufReader, PipeReader, PipeWriter, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::host::{self, Tool};

/// How long an answer or a page may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Messages that wait to be looked at; the browser waits when there are more.
const MESSAGES_WAITING_MAX: usize = 4096;

/// A running browser with an empty profile. It ends on drop.
pub struct Browser {
    child: Child,
    commands: PipeWriter,
    messages: Receiver<Value>,
    /// Events that came while an answer was waited for.
    events: VecDeque<Value>,
    last_id: u64,
    _profile: tempfile::TempDir,
}

/// One tab.
#[derive(Clone, Debug)]
pub struct Page {
    session: String,
    target: String,
    context: String,
}

impl Browser {
    /// Starts it in this thread's network namespace. `arguments` are Chromium's own, such as
    /// `--ignore-certificate-errors`.
    ///
    /// # Errors
    /// Chromium is missing and cannot be installed, or does not start.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        host::need(&[Tool::CHROMIUM])?;
        let profile = tempfile::tempdir().context("making a profile")?;
        let (its_commands, commands) = std::io::pipe().context("making a pipe")?;
        let (answers, its_answers) = std::io::pipe().context("making a pipe")?;
        let mut command = Command::new("chromium");
        command
            .args([
                "--headless=new",
                "--remote-debugging-pipe",
                // Its sandbox refuses to run as root; the pages are ours.
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-extensions",
                "--disable-sync",
                "--no-first-run",
                "--no-default-browser-check",
            ])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .args(arguments)
            .arg("about:blank")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A group of its own, so that its helpers end with it.
            .process_group(0);
        let ends = [its_commands.as_raw_fd(), its_answers.as_raw_fd()];
        // SAFETY: between fork and exec only `fcntl` and `dup2` are called; both may be.
        unsafe {
            command.pre_exec(move || place(ends));
        }
        let child = command.spawn().context("starting chromium")?;
        drop((its_commands, its_answers));
        let (sender, messages) = sync_channel(MESSAGES_WAITING_MAX);
        std::thread::spawn(move || read(answers, &sender));
        Ok(Self {
            child,
            commands,
            messages,
            events: VecDeque::new(),
            last_id: 0,
            _profile: profile,
        })
    }

    /// Opens a tab with cookies and a cache of its own, both empty.
    ///
    /// # Errors
    /// The browser does not answer.
    pub fn open(&mut self) -> Result<Page> {
        let text = |value: &Value, name: &str| -> Result<String> {
            let text = value[name].as_str();
            Ok(text.with_context(|| format!("no {name}"))?.to_owned())
        };
        let context = self.call(None, "Target.createBrowserContext", json!({}))?;
        let context = text(&context, "browserContextId")?;
        let target = json!({ "url": "about:blank", "browserContextId": context });
        let target = text(&self.call(None, "Target.createTarget", target)?, "targetId")?;
        let attach = json!({ "targetId": target, "flatten": true });
        let session = self.call(None, "Target.attachToTarget", attach)?;
        let page = Page {
            session: text(&session, "sessionId")?,
            target,
            context,
        };
        self.command(&page, "Page.enable", json!({}))?;
        Ok(page)
    }

    /// Closes a tab and forgets its cookies and cache.
    ///
    /// # Errors
    /// The browser does not answer.
    pub fn close(&mut self, page: Page) -> Result<()> {
        let target = json!({ "targetId": page.target });
        self.call(None, "Target.closeTarget", target)?;
        let context = json!({ "browserContextId": page.context });
        self.call(None, "Target.disposeBrowserContext", context)?;
        Ok(())
    }

    /// Goes to an address and waits until everything on the page is loaded.
    ///
    /// # Errors
    /// Nothing answers there, or it takes too long.
    pub fn go_to(&mut self, page: &Page, url: &str) -> Result<()> {
        // Of the page before.
        self.events.clear();
        let answer = self.command(page, "Page.navigate", json!({ "url": url }))?;
        if let Some(error) = answer["errorText"].as_str() {
            bail!("{url}: {error}");
        }
        self.event(page, "Page.loadEventFired")
            .with_context(|| format!("waiting for {url} to load"))?;
        Ok(())
    }

    /// The value of a JavaScript expression on the page; a promise is waited for.
    ///
    /// # Errors
    /// The expression throws, or its value is no JSON.
    pub fn evaluate(&mut self, page: &Page, expression: &str) -> Result<Value> {
        let parameters = json!({
            "expression": expression, "returnByValue": true, "awaitPromise": true,
        });
        let mut answer = self.command(page, "Runtime.evaluate", parameters)?;
        if let Some(thrown) = answer.get("exceptionDetails") {
            bail!("{expression}: {thrown}");
        }
        Ok(answer["result"]["value"].take())
    }

    /// Any command of the protocol, to one tab.
    ///
    /// # Errors
    /// The browser refuses it or does not answer.
    pub fn command(&mut self, page: &Page, method: &str, parameters: Value) -> Result<Value> {
        self.call(Some(&page.session), method, parameters)
    }

    /// The next event of a tab with this name, those that already came included.
    ///
    /// # Errors
    /// It does not come.
    pub fn event(&mut self, page: &Page, method: &str) -> Result<Value> {
        let is_wanted =
            |event: &Value| event["method"] == method && event["sessionId"] == page.session;
        if let Some(at) = self.events.iter().position(is_wanted) {
            return self.events.remove(at).context("an event vanished");
        }
        let until = Instant::now() + PATIENCE;
        loop {
            let message = self.receive(until)?;
            if is_wanted(&message) {
                return Ok(message);
            }
            self.remember(message);
        }
    }

    fn call(&mut self, session: Option<&str>, method: &str, parameters: Value) -> Result<Value> {
        self.last_id += 1;
        let id = self.last_id;
        let mut message = json!({ "id": id, "method": method, "params": parameters });
        if let Some(session) = session {
            message["sessionId"] = session.into();
        }
        let mut bytes = serde_json::to_vec(&message)?;
        bytes.push(0);
        self.commands
            .write_all(&bytes)
            .context("the browser is gone")?;
        let until = Instant::now() + PATIENCE;
        loop {
            let mut message = self.receive(until).with_context(|| method.to_owned())?;
            if message["id"] != id {
                self.remember(message);
                continue;
            }
            if let Some(error) = message.get("error") {
                bail!("{method}: {error}");
            }
            return Ok(message["result"].take());
        }
    }

    fn receive(&self, until: Instant) -> Result<Value> {
        let left = until.saturating_duration_since(Instant::now());
        match self.messages.recv_timeout(left) {
            Ok(message) => Ok(message),
            Err(RecvTimeoutError::Timeout) => bail!("the browser does not answer"),
            Err(RecvTimeoutError::Disconnected) => bail!("the browser has ended"),
        }
    }

    fn remember(&mut self, message: Value) {
        if message.get("method").is_some() {
            // Old ones are of no interest, and a page may send any number.
            if self.events.len() == MESSAGES_WAITING_MAX {
                self.events.pop_front();
            }
            self.events.push_back(message);
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            // SAFETY: two integers; the group is our child's, which has not been waited for.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
        // Nothing is left to do when it cannot be waited for.
        let _ = self.child.wait();
    }
}

/// Puts the two descriptors where the browser looks for them. Neither may overwrite the other.
fn place(ends: [i32; 2]) -> std::io::Result<()> {
    let check = |done: i32| match done {
        -1 => Err(std::io::Error::last_os_error()),
        done => Ok(done),
    };
    // SAFETY: these calls take integers; a bad descriptor is an error, not undefined.
    unsafe {
        let commands = check(libc::fcntl(ends[0], libc::F_DUPFD_CLOEXEC, 10))?;
        let answers = check(libc::fcntl(ends[1], libc::F_DUPFD_CLOEXEC, 10))?;
        check(libc::dup2(commands, 3))?;
        check(libc::dup2(answers, 4))?;
    }
    Ok(())
}

fn read(answers: PipeReader, messages: &std::sync::mpsc::SyncSender<Value>) {
    let mut answers = BufReader::new(answers);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        match answers.read_until(0, &mut bytes) {
            Ok(length) if length > 0 => {}
            _ => return,
        }
        bytes.pop();
        let Ok(message) = serde_json::from_slice(&bytes) else {
            continue;
        };
        if messages.send(message).is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_rendered_and_its_scripts_run() {
        let mut browser = Browser::start(&[]).unwrap();
        let page = browser.open().unwrap();
        let url = "data:text/html,<title>t</title><p id=a>1</p>\
                   <script>document.querySelector('p').textContent = 6 * 7</script>";
        browser.go_to(&page, url).unwrap();
        let text = browser.evaluate(&page, "document.getElementById('a').innerText");
        assert_eq!(text.unwrap(), "42");
        let thrown = browser.evaluate(&page, "nowhere.to.be.found");
        assert!(thrown.unwrap_err().to_string().contains("nowhere"));
        assert!(browser.go_to(&page, "http://127.0.0.1:1/").is_err());
        browser.close(page).unwrap();
    }
}
