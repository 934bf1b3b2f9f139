package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/caddyserver/caddy/v2"
)

const (
	// readyTimeout is how long Caddy may take until its certificate for localhost is there.
	readyTimeout = 15 * time.Second
	// stopTimeout is how long Caddy may take to stop: its grace period of 500 ms, and some more to clean up.
	stopTimeout = 800 * time.Millisecond
)

// portError says that a port is taken, and by which flag to choose another.
type portError struct {
	port int
	flag string
	err  error
}

func (e *portError) Error() string {
	return fmt.Sprintf("port %d is in use by another program: choose another with --%s PORT (0 takes any free one)", e.port, e.flag)
}

func (e *portError) Unwrap() error { return e.err }

// reservePort listens on the port, any free one for 0, so that nobody else gets it until Caddy is about to listen.
// Caddy itself would not notice a port in use, if that program, like Caddy, lets others share it (SO_REUSEPORT).
func reservePort(port int, flag string) (*net.TCPListener, error) {
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, &portError{port, flag, err}
	case err != nil:
		return nil, fmt.Errorf("listening on port %d (--%s): %w", port, flag, err)
	}
	return ln, nil
}

func portOf(ln net.Listener) int {
	return ln.Addr().(*net.TCPAddr).Port
}

// proxy is Caddy, running in this process.
type proxy struct {
	dir    string
	failed logTail
}

// startProxy runs Caddy with config, the JSON form of a Caddyfile whose files are all in dir.
func startProxy(config []byte, dir string) (*proxy, error) {
	// Whatever Caddy writes beside its storage (an instance identifier, at times) goes to dir too.
	for _, name := range []string{"XDG_DATA_HOME", "XDG_CONFIG_HOME"} {
		if err := os.Setenv(name, dir); err != nil {
			return nil, fmt.Errorf("setting %s: %w", name, err)
		}
	}
	// Entries from before config's log is set up ("redirected default logger") are held back for that log.
	caddy.BufferedLog()
	if err := caddy.Load(config, true); err != nil {
		return nil, fmt.Errorf("starting Caddy: %w", err)
	}
	return &proxy{dir: dir, failed: logTail{path: filepath.Join(dir, "caddy.log")}}, nil
}

// roots returns the pool with the root certificate of Caddy's local CA.
func (p *proxy) roots() (*x509.CertPool, error) {
	path := filepath.Join(p.dir, "storage", "pki", "authorities", "local", "root.crt")
	pem, err := os.ReadFile(path) //nolint:gosec // in our own temporary directory
	if err != nil {
		return nil, fmt.Errorf("reading the root certificate of Caddy's local CA: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("reading the root certificate of Caddy's local CA: no certificate in %s", path)
	}
	return pool, nil
}

// ready returns once the TLS port answers with a certificate that roots vouch for: Caddy issues it after it has begun
// to listen. The connections made here are not the client's.
func (p *proxy) ready(ctx context.Context, tlsPort int, roots *x509.CertPool) error {
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(tlsPort))
	dialer := &tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: tls.VersionTLS12}}
	for {
		conn, err := dialer.DialContext(ctx, "tcp", addr)
		if err == nil {
			return conn.Close()
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			return fmt.Errorf("waiting for Caddy's TLS port %d: %w", tlsPort, err)
		}
	}
}

// stop stops Caddy, within stopTimeout.
func (p *proxy) stop() error {
	stopped := make(chan error, 1)
	go func() { stopped <- caddy.Stop() }()
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case err := <-stopped:
		return err
	case <-timer.C:
		return fmt.Errorf("stopping Caddy took longer than %s", stopTimeout)
	}
}

// logTail follows the log that Caddy writes, of errors only, as JSON lines.
type logTail struct {
	path string
	read int64
	// count is how many entries there were, last the newest.
	count int
	last  string
}

// poll reads the entries that have come since it was last called.
func (l *logTail) poll() {
	f, err := os.Open(l.path)
	if err != nil {
		return // Caddy makes the file with its first entry
	}
	defer f.Close()
	buf := make([]byte, 64<<10)
	n, _ := f.ReadAt(buf, l.read)
	for chunk := buf[:n]; ; {
		line, rest, whole := bytes.Cut(chunk, []byte("\n"))
		if !whole {
			// An entry larger than the buffer cannot be shown; it must not hide those after it.
			if len(line) == len(buf) {
				l.read += int64(len(line))
			}
			return
		}
		l.read += int64(len(line)) + 1
		chunk = rest
		l.count++
		l.last = logText(line)
	}
}

// logText returns the logger's name, message and error of an entry.
func logText(line []byte) string {
	var entry struct{ Logger, Msg, Error string }
	if json.Unmarshal(line, &entry) != nil {
		return string(line)
	}
	text := entry.Msg
	if entry.Logger != "" {
		text = entry.Logger + ": " + text
	}
	if entry.Error != "" {
		text += ": " + entry.Error
	}
	return text
}
