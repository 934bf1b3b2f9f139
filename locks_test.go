package grpcproxy_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestLocks: proxy/doc.go lists every mutex of the project, and none that there is not.
func TestLocks(t *testing.T) {
	locks := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		top, _, _ := strings.Cut(filepath.ToSlash(path), "/")
		switch {
		case err != nil:
			return err
		case slices.Contains([]string{"bench", "cmd", "e2e", "internal", "testdata", ".git"}, top) && d.IsDir():
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		for _, decl := range file.Decls {
			if gen, ok := decl.(*ast.GenDecl); ok {
				for _, spec := range gen.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						locksIn(locks, spec.Name.Name, spec.Type)
					case *ast.ValueSpec:
						for _, v := range spec.Values {
							if lit, ok := v.(*ast.CompositeLit); ok {
								locksIn(locks, spec.Names[0].Name, lit.Type)
							}
						}
					}
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	_, list, _ := strings.Cut(read(t, "proxy/doc.go"), "# LOCKS")
	for _, m := range regexp.MustCompile(`(?m)^//\t[a-z0-9/]* *([\w.]+\.mu)  `).FindAllStringSubmatch(list, -1) {
		documented[m[1]] = true
	}
	sameKeys(t, "proxy/doc.go", locks, documented)
}

// locksIn finds the mutexes among a struct's fields.
func locksIn(locks map[string]bool, name string, of ast.Expr) {
	st, ok := of.(*ast.StructType)
	if !ok {
		return
	}
	for _, f := range st.Fields.List {
		for _, n := range f.Names {
			switch kind := f.Type.(type) {
			case *ast.SelectorExpr:
				if kind.Sel.Name == "Mutex" || kind.Sel.Name == "RWMutex" {
					locks[name+"."+n.Name] = true
				}
			case *ast.Ident:
				if kind.Name == "mutex" {
					locks[name+"."+n.Name] = true
				}
			case *ast.StructType:
				locksIn(locks, name+"."+n.Name, kind)
			}
		}
	}
}
