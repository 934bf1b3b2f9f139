package discovery

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
)

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// watchFile looks often.
func watchFile(t *testing.T, path string) *recorder {
	t.Helper()
	return watch(t, &File{Path: path, Refresh: caddy.Duration(minRefresh)})
}

func TestFileReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "endpoints.json")
	r := watchFile(t, path)
	r.awaitError(t, "no such file or directory")
	put(t, path, `[{"address": "a:1", "weight": 2}]`)
	r.awaitList(t, "a:1,w=2")
	list, _ := r.last()
	if want := "file://" + path; list[0].Origin != want {
		t.Errorf("origin is %q; want %q", list[0].Origin, want)
	}
	// By renaming: another file of the same size and, to make it hard, with the same time.
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	put(t, path+".new", `[{"address": "b:1", "weight": 2}]`)
	if err := os.Chtimes(path+".new", info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	r.awaitList(t, "b:1,w=2")
	// In place, with the same size.
	put(t, path, `[{"address": "c:1", "weight": 2}]`)
	r.awaitList(t, "c:1,w=2")
	put(t, path, "[]")
	r.awaitList(t)
}

// TestFileConfigMap: what Kubernetes does with a mounted ConfigMap: file -> ..data/file, ..data -> ..timestamp/.
func TestFileConfigMap(t *testing.T) {
	dir := t.TempDir()
	version := func(name, text string) {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		put(t, filepath.Join(dir, name, "endpoints.yaml"), text)
		if err := os.Symlink(name, filepath.Join(dir, "..data_tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", "- address: a:1\n")
	path := filepath.Join(dir, "endpoints.yaml")
	if err := os.Symlink(filepath.Join("..data", "endpoints.yaml"), path); err != nil {
		t.Fatal(err)
	}
	r := watchFile(t, path)
	r.awaitList(t, "a:1")
	version("..2", "- address: b:1\n")
	if err := os.RemoveAll(filepath.Join(dir, "..1")); err != nil {
		t.Fatal(err)
	}
	r.awaitList(t, "b:1")
}

// TestFileMalformed: the list stays, the error is told once, and the file is read again when it was mended.
func TestFileMalformed(t *testing.T) {
	path := filepath.Join(t.TempDir(), "endpoints")
	put(t, path, "- address: a:1\n")
	r := watchFile(t, path)
	r.awaitList(t, "a:1")
	put(t, path, "- address: a:1\n- address: b\n")
	r.awaitError(t, path+`: line 2: entry 2: address: upstream address "b" has no port`)
	put(t, path, "")
	r.awaitError(t, path+": the list is empty text")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	r.awaitError(t, path+" is not a regular file")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	r.awaitError(t, "no such file")
	if updates, _ := r.count(); updates != 1 {
		t.Errorf("%d updates; the list stays while there is trouble", updates)
	}
	put(t, path, `[{"address": "a:1"}]`)
	waitFor(t, func() bool { updates, _ := r.count(); return updates == 2 }) // The same again, since there was trouble.
	r.awaitList(t, "a:1")
}

func TestFileErrorOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "endpoints.yaml")
	put(t, path, "{")
	w := fileWatch{path: path, refresh: time.Second}
	r := &reporter{sink: newRecorder()}
	if next, err := w.look(t.Context(), r); err == nil || next != time.Second {
		t.Fatalf("got %v, %v; want an error", next, err)
	}
	for range 3 {
		if next, err := w.look(t.Context(), r); err != nil || next != time.Second {
			t.Fatalf("got %v, %v; the error was told", next, err)
		}
	}
	put(t, path, "- address: x\n")
	if _, err := w.look(t.Context(), r); err == nil {
		t.Error("another error is not told")
	}
}

// TestFileRests: a file that has long been the same is not read again.
func TestFileRests(t *testing.T) {
	path := filepath.Join(t.TempDir(), "endpoints.yaml")
	put(t, path, "- address: a:1\n")
	w := fileWatch{path: path, refresh: time.Second}
	sink := newRecorder()
	r := &reporter{sink: sink}
	rewrite := func(text string, age time.Duration) {
		put(t, path, text)
		then := time.Now().Add(-age)
		if err := os.Chtimes(path, then, then); err != nil {
			t.Fatal(err)
		}
		if _, err := w.look(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	rewrite("- address: b:1\n", time.Hour)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if !w.unchanged(info) {
		t.Error("an old file is read again")
	}
	// Another file, just as old and as large, is read.
	put(t, path+".new", "- address: d:1\n")
	if err := os.Chtimes(path+".new", info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	if _, err := w.look(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	sink.awaitList(t, "d:1")
	rewrite("- address: c:1\n", 0)
	if info, err = os.Stat(path); err != nil || w.unchanged(info) {
		t.Errorf("a file that was written just now is not read again (%v)", err)
	}
	sink.awaitList(t, "c:1")
}

func TestFileTooLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "endpoints.json")
	put(t, path, "["+strings.Repeat(" ", maxListSize)+"]")
	watchFile(t, path).awaitError(t, "is larger than 32 MiB")
}

func TestFileConfig(t *testing.T) {
	refused(t, &File{}, "path is missing")
	refused(t, &File{Path: "x", Refresh: 1}, "refresh is 1ns")
	t.Setenv("FILE_DIR", "/run")
	f := &File{Path: "{env.FILE_DIR}/endpoints.json"}
	if err := provision(t, f); err != nil || f.path != "/run/endpoints.json" || time.Duration(f.Refresh) != time.Second {
		t.Errorf("got %+v, %v", f, err)
	}
	runCaddyfile(t, []caddyfileCase{
		{input: "file /run/endpoints.json", json: `{"path":"/run/endpoints.json"}`},
		{input: "file /run/endpoints.json {\n refresh 5s\n}", json: `{"path":"/run/endpoints.json","refresh":5000000000}`},
		{input: "file", err: "wrong argument count"},
		{input: "file a b", err: "wrong argument count"},
		{input: "file a {\n format yaml\n}", err: `unrecognized subdirective "format"; expected refresh`},
		{input: "file a {\n refresh off\n}", err: `refresh: "off" is not a duration`},
	})
}
